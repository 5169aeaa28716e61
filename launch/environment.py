"""Where a process stands, by what its launcher tells it through the environment; the device it takes; how it ends.

The `deepspeed` launcher sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT. torchrun sets
LOCAL_WORLD_SIZE instead of LOCAL_SIZE. If `srun` starts a step of several tasks, Slurm's own variables give the same.
Without any of them the process is a world of one.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from launch.health.node_watch import PULSES, Pulses
from launch.health.processes import die_with_parent
from launch.plurals import counted
from launch.slurm.world import world_of_step

_FIRST_WORD_SECONDS = 20.0
"""How long rank 0 has to report a fault. The launcher looks once a second and ends all ranks once one has failed."""


class DeviceUnavailable(ValueError):
    """A device that the job asks for and this node lacks."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    master_address: str = "127.0.0.1"
    """Where rank 0 listens for the others."""
    master_port: int = 0


def place_in_world() -> Place:
    """Reads the launcher's variables; sets those of a world of one where there is no launcher.

    A launcher takes this process with it, even if it is killed and cannot pass that on. Variables that describe no
    world end the process with status 2 and a message: without its rank it can tell nobody else.
    """
    _open_closed_streams()
    step = world_of_step(os.environ)
    if "WORLD_SIZE" not in os.environ and step is not None:
        os.environ.update(step)
    if "WORLD_SIZE" not in os.environ:
        # Port 0: the one process listens on any that is free, and nobody has to find it.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    else:
        die_with_parent()
    try:
        return _place_of(os.environ)
    except ValueError as error:
        print(
            f"{error}; start the job by deepspeed, torchrun or srun, or unset WORLD_SIZE for one process",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def _open_closed_streams() -> None:
    """Leads a standard stream that was closed (`>&-`) nowhere: the next file to be opened would be in its place, and
    what libraries print would land in there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)


def _place_of(variables: Mapping[str, str]) -> Place:
    """Raises ValueError where the launcher's variables are incomplete or describe no world."""
    world = f"the environment has WORLD_SIZE={variables['WORLD_SIZE']}"

    def number(*names: str) -> int:
        text = next((variables[name] for name in names if variables.get(name)), "")
        if not text.isdecimal():
            raise ValueError(f"{world}, but {names[0]} {f'is {text!r}, no number' if text else 'is not set'}")
        return int(text)

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name):
            raise ValueError(f"{world}, but {name} is not set")
    rank, local_rank, world_size, port = (number(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    told = "LOCAL_SIZE" in variables or "LOCAL_WORLD_SIZE" in variables
    local_size = number("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if told else 1
    if rank >= world_size or (told and local_rank >= local_size):
        raise ValueError(
            f"{world} and RANK={rank}, LOCAL_SIZE={local_size} and LOCAL_RANK={local_rank}; ranks count from 0"
        )
    return Place(rank, local_rank, world_size, local_size, variables["MASTER_ADDR"], port)


def node_name() -> str:
    """This node as Slurm calls it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def start_name() -> str:
    """What to call this start of a run: 123-0 for a Slurm job and its restart, else the time."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else time.strftime("%Y%m%d-%H%M%S")


def node_pulses() -> Pulses | None:
    """Where a process of this node wants to see the pulses of its ranks, if there is one."""
    path = os.environ.get(PULSES)
    try:
        return Pulses(Path(path)) if path else None
    except OSError:  # that process is gone, or out of sight: the variable was inherited from elsewhere
        return None


def under_slurm() -> bool:
    """Whether this is part of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def choose_device(wanted: str, place: Place) -> tuple[torch.device, str]:
    """The device of this process and a sentence saying why. `wanted` is job.device.

    Tells DeepSpeed too, so it must run before DeepSpeed is imported. Raises DeviceUnavailable where GPUs were asked for
    and are not there.
    """
    gpus = torch.cuda.device_count()
    there = f"{counted(gpus, 'GPU')} for {counted(place.local_size, 'process', 'processes')}"
    if wanted == "cuda" and gpus < place.local_size:
        raise DeviceUnavailable(
            f"job.device is cuda, but this node has {there}; start fewer processes, or set job.device: cpu"
        )
    why = f"{there} on this node" if wanted == "auto" else f"job.device is {wanted}"
    if wanted == "cuda" or (wanted == "auto" and gpus >= place.local_size):
        os.environ["DS_ACCELERATOR"] = "cuda"
        # A step asks for memory in other sizes than the one before freed: without this a tenth of it lies idle.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # Of NCCL's last collectives, so that a hang can be explained; read when the first one is called.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank), f"GPUs with NCCL: {why}"
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu"), f"CPU with gloo: {why}"


def end_process(status: int) -> NoReturn:
    """Ends this process with `status`: an interpreter that tears down gloo's threads may abort, with another."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk under the log changes nothing about what was done
            stream.flush()
    os._exit(status)


def report_failure(text: str, place: Place, *, leads: bool | None = None) -> None:
    """Tells the user why this rank is about to fail: once a node, and rank 0 first. A fault that only some ranks know
    is told at once by the one of them that `leads`.

    The others wait, because the first rank that ends takes all of its node with it, the report of rank 0 included. One
    that outlives the wait is on another node, or has a fault that rank 0 has not, and speaks if it is its node's first.
    """
    speaks = not place.local_rank if leads is None else leads
    if not leads and place.rank:
        time.sleep(_FIRST_WORD_SECONDS)
    if speaks:
        print(text, file=sys.stderr, flush=True)
