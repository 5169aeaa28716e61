"""The protocol by which GPUs read each other's memory, run on a model of GPUs in many orders, or in all."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from graphlib import TopologicalSorter
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel import peer_memory, transport
from parallel.peer_flags import Batch
from parallel.transport import SymmetricTransport
from tests.unit.gpu_model import LIKE, SHAPE, Host, Operation, Stream, World, issue, one_queue, streams_of, world


@pytest.mark.parametrize("capturing", [False, True])
def test_memory_that_graphs_use_outlives_its_growth(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(0, 2)
    cuda = SimpleNamespace(
        Stream=lambda device, priority: Stream(host),
        current_stream=lambda device: host.main,
        stream=nullcontext,
        is_current_stream_capturing=lambda: capturing,
        synchronize=lambda device: None,
        empty_cache=lambda: None,
    )
    made: list[weakref.ref[Any]] = []

    def rendezvous(memory: Any, group: Any) -> Any:
        made.append(weakref.ref(memory))
        slot = SimpleNamespace(shape=SHAPE, dtype=torch.float32)
        return SimpleNamespace(signal_pad_ptrs=[0, 1000], get_buffer=lambda *_: slot)

    monkeypatch.setattr(Batch, "issue", lambda *_: None)
    monkeypatch.setattr(transport, "torch", SimpleNamespace(cuda=cuda, empty=torch.empty, uint8=torch.uint8))
    monkeypatch.setattr(transport, "dist", SimpleNamespace(get_rank=lambda group: 0, barrier=lambda group: None))
    symmetric = SimpleNamespace(empty=lambda size, **_: torch.empty(size), rendezvous=rendezvous)
    monkeypatch.setattr(peer_memory, "symmetric_memory", symmetric)
    monkeypatch.setattr(peer_memory, "torch", SimpleNamespace(cuda=cuda, uint8=torch.uint8))
    tested: Any = SymmetricTransport(host, "cpu")  # type: ignore[arg-type]
    for elements in (4, 1000, 2000):
        slot = tested.slot((elements,), LIKE)
        tested.exchange(slot, lambda owner, reader: [], lambda owner, parts: None)
    assert [memory() is not None for memory in made] == [capturing, capturing, True]


def some_waits(random: Random) -> list[int | None]:
    """A few exchanges, each waited for at once, a little later or at the end."""
    count = random.randint(1, 12)
    return [random.choice((number, number + random.randint(0, 6), None)) for number in range(count)]


def test_no_slot_is_overwritten_and_nobody_waits_for_ever() -> None:
    """Ranks as slow as they like, and of their streams too."""
    for seed in range(300):
        random = Random(seed)
        size, slots, waits = random.randint(2, 4), random.randint(1, 4), some_waits(random)
        hosts = [issue(rank, size, waits, slots) for rank in range(size)]
        ahead = random.choice((0.0, 0.5, 0.9))

        def choose(count: int, random: Random = random, ahead: float = ahead) -> int:  # often one rank far ahead
            return 0 if random.random() < ahead else random.randrange(count)

        world(hosts, random.choice((one_queue, streams_of))).run(choose)


@pytest.mark.parametrize("waits", [[0] * 5, [None] * 5, [0, 2, 2, 4, 4]])
def test_every_order_of_two_ranks(waits: list[int | None]) -> None:
    """With two slots only, and exhaustively, but for the order of what only its own rank sees."""
    start = world([issue(rank, 2, waits, slots=2) for rank in range(2)], streams_of)
    seen, left = set(), [start]
    while left:
        here = left.pop()
        possible = here.possible()
        if not possible:
            here.run(lambda count: 0)  # asserts that all is done
        private = [at for at in possible if here.following(*at)[0] in ("allocate", "work", "use")]
        for at in private[:1] or possible:
            there = here.copy()
            there.step(*at)
            state = tuple(itertools.chain(*there.at, sorted(there.words.items())))
            if state not in seen:
                seen.add(state)
                left.append(there)
    assert len(seen) > 1000


def test_graphs_may_run_their_branches_in_any_order() -> None:
    """Recorded exchanges, replayed in turns, each time one operation after the other as their edges allow."""
    for seed in range(150):
        random = Random(seed)
        size = random.randint(2, 4)
        graphs = [some_waits(random) for _ in range(random.randint(1, 2))]
        recorded = [[issue(rank, size, waits, capturing=True) for rank in range(size)] for waits in graphs]
        replays = random.choices(recorded, k=4)
        queues, after = [], []
        for rank in range(size):
            queue: list[tuple[int, Operation]] = []
            edges: list[frozenset[int]] = []
            for replay in replays:
                host, start = replay[rank], len(edges)
                edges += [frozenset(start + before for before in of) for of in host.after]
                queue += [(start + number, host.issued[number][1]) for number in any_order(host, random)]
            queues.append([queue])
            after.append(edges)
        World(queues, after).run(random.randrange)


def any_order(host: Host, random: Random) -> Iterator[int]:
    """Operations as their edges allow: a stream that may always go on first, or both in turns."""
    ordered, main_first = TopologicalSorter(dict(enumerate(host.after))), random.choice((0.0, 0.5, 1.0))
    ordered.prepare()
    ready = list(ordered.get_ready())
    while ready:
        preferred = [n for n in ready if (host.issued[n][0] is host.main) == (random.random() < main_first)]
        ready.remove(taken := random.choice(preferred or ready))
        yield taken
        ordered.done(taken)
        ready += ordered.get_ready()
