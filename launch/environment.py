"""What the launcher tells a process through its environment: the only place that reads it.

The `deepspeed` launcher sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT; torchrun says
LOCAL_WORLD_SIZE for LOCAL_SIZE. Without any of them the process is a world of one.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int


def place_in_world() -> Place:
    """Reads the launcher's variables; sets those of a world of one where there is no launcher."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    read = os.environ
    local_size = read.get("LOCAL_SIZE") or read.get("LOCAL_WORLD_SIZE") or "1"
    return Place(int(read["RANK"]), int(read["LOCAL_RANK"]), int(read["WORLD_SIZE"]), int(local_size))


def choose_device(wanted: str, place: Place) -> tuple[torch.device, str]:
    """The device of this process and a sentence saying why. `wanted` is job.device.

    Tells DeepSpeed too, so it must run before DeepSpeed is imported. Raises ValueError where GPUs were asked for and
    are not there.
    """
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus < place.local_size:
        raise ValueError(
            f"job.device is cuda, but this node has {gpus} GPUs for {place.local_size} processes; start fewer "
            "processes, or set job.device: cpu"
        )
    if wanted == "cuda" or (wanted == "auto" and gpus >= place.local_size):
        os.environ["DS_ACCELERATOR"] = "cuda"
        torch.cuda.set_device(place.local_rank)
        why = "job.device is cuda" if wanted == "cuda" else f"{gpus} GPUs for {place.local_size} processes on this node"
        return torch.device("cuda", place.local_rank), f"GPUs with NCCL: {why}"
    os.environ["DS_ACCELERATOR"] = "cpu"
    why = "job.device is cpu" if wanted == "cpu" else f"{gpus} GPUs for {place.local_size} processes on this node"
    return torch.device("cpu"), f"CPU with gloo: {why}"
