"""One rank of context-parallel attention by itself, on one GPU, beside a peer that is never late.

    python benchmarks/attention_alone.py [--kernel flash_attn_4] [--rows REGEX] [--modes REGEX] [--peers]

Two ranks run one after the other. What a rank reads of its peer lies on the same GPU, and it waits for no flag.
Kernels, copies and the host's work are those of two GPUs. So what its share of the ideal lacks is due to these; what
two GPUs lack beyond it is due to the link and to waiting. With --peers, ring-flash-attn's zigzag takes part, whose
messages here arrive at once and cost nothing.

Backward runs on the calling thread. Ranks and one GPU take turns, as in `ring_attention.py`: a share is of the turns of
one GPU just before and just after, median of five rounds. The table shows the slower rank's.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attention_contest.contestants import Builder, Stage, our_contestants
from attention_contest.peers import peers
from attention_contest.rows import HEAD_DIM, ONE_GPU, RING_FLASH_ATTN, Row, bars
from documents import markdown
from free_messages import nobody_waits
from parallel import transport
from parallel.transport import SymmetricTransport

RANKS, ROUNDS, SECONDS_A_TURN = 2, 5, 0.12
ZIGZAG = f"{RING_FLASH_ATTN} zigzag"

Action = Callable[[], object]


class SharedMemory:
    """`PeerMemory` of ranks that are all in this process: who asks first makes it."""

    _made: dict[tuple[int, int], SharedMemory] = {}

    def __new__(cls, size: int, device: torch.device, group: Any) -> SharedMemory:
        key = group.number, size
        if key not in cls._made:
            found = cls._made[key] = super().__new__(cls)
            found._buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(RANKS)]
            found._pads = [torch.zeros(256, dtype=torch.int32, device=device) for _ in range(RANKS)]
            found.signal_pads = [pad.data_ptr() for pad in found._pads]
        return cls._made[key]

    _buffers: list[Tensor]
    _pads: list[Tensor]
    signal_pads: list[int]

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> Tensor:
        return self._buffers[rank].view(dtype)[start : start + math.prod(shape)].view(shape)


class FreeMessages:
    """ring-flash-attn's RingComm where messages arrive at once: what is sent comes back."""

    def __init__(self, rank: int, process_group: None):
        self.rank, self.world_size = rank, RANKS

    def send_recv_kv(self, k: Tensor, v: Tensor, *buffers: Tensor | None) -> tuple[Tensor, Tensor]:
        return k, v

    def wait(self) -> None:
        pass


@contextmanager
def never_late() -> Iterator[None]:
    """Transports made and used inside share memory within this process, and wait for nobody."""
    group_functions = SimpleNamespace(get_rank=lambda group: group.rank, barrier=lambda group: None)
    with (
        mock.patch.object(transport, "dist", group_functions),
        mock.patch.object(transport, "PeerMemory", SharedMemory),
        nobody_waits(),
    ):
        yield


def stage_of(row: Row, kernel: str, rank: int) -> Stage:
    device = torch.device("cuda", 0)

    @cache
    def made(number: int) -> SymmetricTransport:
        group: Any = SimpleNamespace(size=lambda: RANKS, rank=rank, number=number)
        return SymmetricTransport(group, device)

    return Stage(row, kernel, device, rank, RANKS, made)


def builders(stage: Stage, options: argparse.Namespace) -> dict[str, Builder]:
    """One GPU, those of our modes that are asked for, and with `--peers` the peer that can take part."""
    ours = our_contestants(stage)
    del ours["zigzag ring"]  # its messages need a world
    found = {name: build for name, build in ours.items() if name == ONE_GPU or re.search(options.modes, name)}
    if options.peers:
        found |= {name: build for name, build in peers(stage).items() if name == ZIGZAG}
    return found


def action_of(name: str, build: Builder, stage: Stage) -> Action:
    """A forward and backward of this rank, on its part of random inputs."""
    contestant, generator = build(), torch.Generator(stage.device).manual_seed(17)
    heads, kv_heads = stage.row.heads, stage.row.key_value_heads
    at = contestant.positions.to(stage.device)
    q, k, v, gradient = (
        torch.randn((1, stage.length, count, HEAD_DIM), device=stage.device, dtype=torch.bfloat16, generator=generator)[
            :, at
        ]
        for count in (heads, kv_heads, kv_heads, heads)
    )
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def run() -> None:
        if name == ZIGZAG:
            module: Any = import_module("ring_flash_attn.zigzag_ring_flash_attn")
            module.RingComm = partial(FreeMessages, stage.rank)
        torch.autograd.grad(contestant.attend(q, k, v), leaves, gradient)

    return run


def turn(action: Action) -> float:
    """Milliseconds, median over the calls of one turn."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    calls = max(3, min(200, int(SECONDS_A_TURN / (time.perf_counter() - began))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(following) for one, following in pairwise(marks))


def measure(row: Row, options: argparse.Namespace) -> list[list[str]]:
    """A line of the table for each contestant."""
    SharedMemory._made.clear()
    actions: dict[str, list[Action]] = {}
    for rank in range(RANKS):
        stage = stage_of(row, options.kernel, rank)
        for name, build in builders(stage, options).items():
            actions.setdefault(name, []).append(action_of(name, build, stage))
    [single, _] = actions.pop(ONE_GPU)
    for action in [single, *(action for of_ranks in actions.values() for action in of_ranks)] * 2:
        action()  # compiles, and fills both ranks' memory with numbers: zeros would be multiplied faster
    shares: dict[str, list[list[float]]] = {name: [[] for _ in of_ranks] for name, of_ranks in actions.items()}
    times: dict[str, list[list[float]]] = {name: [[] for _ in of_ranks] for name, of_ranks in actions.items()}
    singles = [turn(single)]
    for _ in range(ROUNDS):
        for name, of_ranks in actions.items():
            for rank, action in enumerate(of_ranks):
                times[name][rank].append(turn(action))
                singles.append(turn(single))
                ideal = (singles[-2] + singles[-1]) / 2 / RANKS
                shares[name][rank].append(ideal / times[name][rank][-1])
    lines = [[row.name, ONE_GPU, f"{statistics.median(singles):.3f}", ""]]
    for name in actions:
        milliseconds = " and ".join(f"{statistics.median(of_rank):.3f}" for of_rank in times[name])
        share = min(statistics.median(of_rank) for of_rank in shares[name])
        lines.append([row.name, name, milliseconds, f"{share:.1%}"])
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="flash_attn_4")
    parser.add_argument("--rows", default="", help="regular expression on the bars' row names")
    parser.add_argument("--modes", default="exchange|heads", help="regular expression on our modes")
    parser.add_argument("--peers", action="store_true", help=f"{ZIGZAG} too, on rows of flash_attn_2")
    options = parser.parse_args()
    rows = dict.fromkeys(bar.row for bar in bars() if bar.kernel == options.kernel)
    with never_late(), torch.autograd.set_multithreading_enabled(False):
        for row in rows:
            if re.search(options.rows, row.name):
                print(markdown(["shape", "contestant", "ms of each rank", "share"], measure(row, options)), flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
