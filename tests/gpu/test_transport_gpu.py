"""Exchanges between GPUs that are never at the same point: what arrives is what was offered, in graphs too."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.transport import MessageTransport, SymmetricTransport, Transport, make_transport
from tests.distributed.harness import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
N = 2**20
EXCHANGES = 200


def dawdle(random: Random) -> None:
    """Keeps the current stream busy for up to a millisecond; mostly not at all."""
    if random.random() < 0.4:
        torch.cuda._sleep(int(random.random() ** 3 * 2_000_000))


def trade(transport: Transport, filling: Tensor, random: Random) -> tuple[Any, Tensor]:
    """Begins an exchange in which each rank takes its own part of every other rank's slot: (arrival, [P, N / P])."""
    size, rank = dist.get_world_size(), dist.get_rank()
    landing = torch.full((size, N // size), -1.0, device="cuda")
    slot = transport.slot((N,), landing)
    dawdle(random)
    slot.copy_(filling)

    def rows(owner: int, reader: int) -> list[slice]:
        return [slice(reader * (N // size), (reader + 1) * (N // size))]

    def place(owner: int, parts: list[Tensor]) -> None:
        landing[owner].copy_(parts[0])

    landing[rank].copy_(filling[rows(rank, rank)[0]])
    arrival = transport.exchange(slot, rows, place)
    dawdle(random)
    return arrival, landing


def wanted(number: float) -> Tensor:
    """[P, N / P]: what this rank's landing holds after exchange `number`."""
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = torch.arange(rank * (N // size), (rank + 1) * (N // size), device="cuda") % 97
    return torch.stack([tokens + 1000.0 * owner + number for owner in range(size)])


def _exchanges() -> tuple[bool, list[int]]:
    """Whether memory was read, and the exchanges that went wrong."""
    device, rank = torch.device("cuda", torch.cuda.current_device()), dist.get_rank()
    transport, random, together = make_transport(dist.group.WORLD, device), Random(rank), Random(7)
    ours = torch.arange(N, device="cuda") % 97 + 1000.0 * rank
    wrong: list[Tensor] = []
    open_: list[tuple[int, Any, Tensor]] = []

    def finish() -> None:
        number, arrival, landing = open_.pop(0)
        arrival.wait()
        wrong.append((landing != wanted(number)).any())

    for number in range(EXCHANGES):
        open_.append((number, *trade(transport, ours + number, random)))
        while open_ and (len(open_) > 6 or together.random() < 0.5):
            finish()
        if random.random() < 0.05:  # a host that waits, as for memory or a new kernel
            torch.cuda.synchronize()
    while open_:
        finish()
    return isinstance(transport, SymmetricTransport), torch.stack(wrong).nonzero().flatten().tolist()


def _graphs() -> list[int]:
    """Replays in turn of two graphs with six exchanges each, all of them under way at once, that went wrong."""
    device, rank = torch.device("cuda", torch.cuda.current_device()), dist.get_rank()
    transport, random = make_transport(dist.group.WORLD, device), Random(rank)
    if isinstance(transport, MessageTransport):
        return []
    ours = torch.arange(N, device="cuda") % 97 + 1000.0 * rank
    base = torch.zeros((), device="cuda")

    def six() -> list[Tensor]:
        found = [trade(transport, ours + (base + number), random) for number in range(6)]
        for arrival, _ in found:
            arrival.wait()
        return [landing for _, landing in found]

    six()
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            landings = six()
        graphs.append((graph, landings))
    wrong = []
    for replay in range(30):
        graph, landings = graphs[replay * 7 % 5 % 2]
        dawdle(random)
        base.fill_(10 * replay)
        graph.replay()
        wrong += [(landing != wanted(10 * replay + number)).any() for number, landing in enumerate(landings)]
    return torch.stack(wrong).nonzero().flatten().tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_far_apart_take_what_was_offered(ranks: int) -> None:
    for _, wrong in run_distributed(_exchanges, ranks, device_type="cuda"):
        assert wrong == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_recorded_exchanges_too(ranks: int) -> None:
    for wrong in run_distributed(_graphs, ranks, device_type="cuda"):
        assert wrong == []
