"""Runs a function in N processes that form a world (gloo on CPU, NCCL on GPUs, which ranks share if there are too few),
and returns what each rank returned.

Processes are forked from one server that has imported torch and DeepSpeed once: a four-process test starts in a second
instead of half a minute.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PRELOADED = [
    "torch",
    "torch.distributed.checkpoint",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # deepspeed.initialize would: with it, most of torch's compiler
    "launch.run",  # with it, the trainer, and most of what tests of it import
    "pytest",
    "tests.distributed.preloaded",
]
"""What the server imports, which every rank would otherwise do by itself."""


class RankFailed(RuntimeError):
    """A rank raised; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 600, device_type: str = "cpu"
) -> list[Any]:
    """Calls `function(*arguments)` on every rank of a fresh world; results in rank order.

    Raises RankFailed with the first failing rank's traceback, and TimeoutError after `timeout` seconds; either way no
    process survives.
    """
    os.environ["DS_ACCELERATOR"] = device_type  # read when DeepSpeed is imported, and inherited by what starts here
    if device_type == "cuda":
        context: Any = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank_main, args=(function, rank, world_size, f"{folder}/store", sender, arguments, device_type)
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_ends = {receiver: rank for rank, receiver in enumerate(receivers)}
    while open_ends:
        ready = wait(list(open_ends), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(open_ends.values())} did not finish in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = open_ends.pop(receiver)
            try:
                succeeded, value = receiver.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RankFailed(f"rank {rank} raised\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that the kernel gives to whoever asks for any: it is
    free still when a launcher has started."""
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    sender: Connection,
    arguments: tuple,
    device_type: str,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    from parallel.zero import initialize_distributed

    torch.set_num_threads(1)
    faulthandler.enable()
    try:
        if device_type == "cuda":
            from gpu_sharing import gpu_of

            gpu_of(rank, world_size)
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        initialize_distributed(device_type)
        result = (True, function(*arguments))
    except BaseException:  # the parent raises it with this traceback
        result = (False, traceback.format_exc())
    sender.send(result)
    sender.close()
    if result[0]:
        dist.barrier()
    os._exit(0)  # gloo's threads may outlive the group and abort at a normal exit
