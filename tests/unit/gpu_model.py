"""A model of GPUs that read each other's memory: streams are queues, ranks are as slow as the model checker likes, and
a slot that is read while it is written, too early or too late is an error.

What is run is what `SymmetricTransport` issues; only the driver, streams and events are the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel import peer_memory, transport
from parallel.peer_flags import Batch
from parallel.transport import SymmetricTransport

Operation = tuple[Any, ...]
LIKE = torch.empty(0, dtype=torch.float32)
SHAPE = (4,)
PAD = 1000
"""Bytes from one rank's flags to the next's."""


class Stream:
    def __init__(self, host: Host):
        self.host = host
        self.last: list[int] = []
        """Operations that the next one comes after: the stream's last one, and those it was told to wait for since."""

    def issue(self, *operation: Any) -> None:
        self.host.issued.append((self, operation))
        self.host.after.append(frozenset(self.last))
        self.last = [len(self.host.issued) - 1]

    def record_event(self) -> list[int]:
        return list(self.last)

    def wait_event(self, event: list[int]) -> None:
        self.last += event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Host:
    """What one rank issues."""

    def __init__(self, rank: int, size: int):
        self.rank, self.ranks = rank, size
        self.issued: list[tuple[Stream, Operation]] = []
        self.after: list[frozenset[int]] = []
        """Of each operation, those that it must come after."""
        self.main = Stream(self)
        self.current = self.main

    def size(self) -> int:
        """As a process group."""
        return self.ranks


class Memory:
    """A slot, or rows of it."""

    shape, dtype = SHAPE, torch.float32

    def __init__(self, owner: int, number: int):
        self.owner, self.number = owner, number

    def __getitem__(self, rows: slice) -> Memory:
        return self


def issue(rank: int, size: int, waits: list[int | None], slots: int = 4, capturing: bool = False) -> Host:
    """A rank's exchanges, as `SymmetricTransport` issues them; `waits`: after which later exchange is each waited for
    (None: after the last)."""
    host = Host(rank, size)

    def issue_batch(batch: Batch, stream: Stream) -> None:
        for writes, address, value in batch.operations:
            pad, inside = divmod(address, PAD)
            assert 0 <= pad < size and inside in range(0, 8 * slots * size, 4), "no flag of any rank's memory"
            stream.issue("write" if writes else "wait", address, value)

    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        host.current, before = stream, host.current
        yield
        host.current = before

    cuda = SimpleNamespace(
        Stream=lambda device, priority: Stream(host),
        current_stream=lambda device: host.current,
        stream=use,
        is_current_stream_capturing=lambda: capturing,
        synchronize=lambda device: None,
        empty_cache=lambda: None,
    )
    handle = SimpleNamespace(
        signal_pad_ptrs=[PAD * rank for rank in range(size)],
        get_buffer=lambda owner, shape, dtype, start: Memory(owner, start * dtype.itemsize // 512),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SymmetricTransport, "_SLOTS", slots)
        patch.setattr(Batch, "issue", issue_batch)
        patch.setattr(transport, "torch", SimpleNamespace(cuda=cuda, empty=torch.empty, uint8=torch.uint8))
        patch.setattr(transport, "dist", SimpleNamespace(get_rank=lambda group: rank, barrier=lambda group: None))
        memory = SimpleNamespace(empty=lambda *_, **__: None, rendezvous=lambda *_: handle)
        patch.setattr(peer_memory, "symmetric_memory", memory)
        patch.setattr(peer_memory, "torch", SimpleNamespace(cuda=cuda, uint8=torch.uint8))
        tested: Any = SymmetricTransport(host, "cpu")  # type: ignore[arg-type]
        arrivals: dict[int, Any] = {}

        def finish(number: int) -> None:
            arrivals.pop(number).wait()
            host.main.issue("use", number)

        for number, _ in enumerate(waits):

            def place(owner: int, parts: list[Any], number: int = number) -> None:
                host.current.issue("read", owner, parts[0].number, number)
                host.current.issue("has read", owner, parts[0].number, number)

            host.main.issue("allocate", number)
            slot = tested.slot(SHAPE, LIKE)
            host.main.issue("fill", slot.number)
            host.main.issue("filled", slot.number)
            arrivals[number] = tested.exchange(slot, lambda owner, reader: [slice(0, 4)], place)
            host.main.issue("work")
            for earlier in [earlier for earlier in arrivals if waits[earlier] == number]:
                finish(earlier)
        for number in sorted(arrivals):
            finish(number)
    return host


class World:
    """All ranks' GPUs. `run` takes one step after the other as `choose` says, and raises where the protocol fails."""

    def __init__(self, queues: list[list[list[tuple[int, Operation]]]], after: list[list[frozenset[int]]]):
        self.queues, self.after, self.size = queues, after, len(queues)
        self.at = [[0] * len(of_rank) for of_rank in queues]
        self.done: list[set[int]] = [set() for _ in queues]
        self.words: dict[int, int] = {}
        self.filling: set[tuple[int, int]] = set()
        self.reading: set[tuple[int, int, int]] = set()
        self.fills: dict[tuple[int, int], int] = {}
        self.reads: dict[tuple[int, int, int], int] = {}
        self.allocated: set[tuple[int, int]] = set()
        self.arrived: dict[tuple[int, int], int] = {}

    def copy(self) -> World:
        other = copy.copy(self)
        for name in ("words", "filling", "reading", "fills", "reads", "allocated", "arrived"):
            setattr(other, name, getattr(self, name).copy())
        other.at, other.done = [list(of) for of in self.at], [set(of) for of in self.done]
        return other

    def possible(self) -> list[tuple[int, int]]:
        """(rank, queue) whose next operation can run."""
        return [
            (rank, number)
            for rank, of_rank in enumerate(self.queues)
            for number, queue in enumerate(of_rank)
            if self.at[rank][number] < len(queue) and self._can(rank, *queue[self.at[rank][number]])
        ]

    def following(self, rank: int, number: int) -> Operation:
        return self.queues[rank][number][self.at[rank][number]][1]

    def _can(self, rank: int, identity: int, operation: Operation) -> bool:
        if not self.after[rank][identity] <= self.done[rank]:
            return False
        return operation[0] != "wait" or self.words.get(operation[1], 0) == operation[2]

    def step(self, rank: int, number: int) -> None:
        identity, (kind, *what) = self.queues[rank][number][self.at[rank][number]]
        self.at[rank][number] += 1
        self.done[rank].add(identity)
        if kind == "write":
            self.words[what[0]] = what[1]
        elif kind == "allocate":
            self.allocated.add((rank, what[0]))
        elif kind == "fill":
            readers = [reading for reading in self.reading if reading[1:] == (rank, what[0])]
            assert not readers, f"rank {rank} overwrites slot {what[0]} while it is read"
            owed = [self.reads.get((peer, rank, what[0]), 0) for peer in range(self.size) if peer != rank]
            assert set(owed) == {self.fills.get((rank, what[0]), 0)}, f"rank {rank} overwrites what was not read"
            self.filling.add((rank, what[0]))
        elif kind == "filled":
            self.filling.remove((rank, what[0]))
            self.fills[rank, what[0]] = self.fills.get((rank, what[0]), 0) + 1
        elif kind == "read":
            owner, slot, exchange = what
            assert (rank, exchange) in self.allocated, "rows arrive where memory may still be in use"
            assert (owner, slot) not in self.filling, "a slot is read while it is filled"
            assert self.fills.get((owner, slot), 0) == self.reads.get((rank, owner, slot), 0) + 1, "an old slot is read"
            self.reading.add((rank, owner, slot))
        elif kind == "has read":
            owner, slot, exchange = what
            self.reading.remove((rank, owner, slot))
            self.reads[rank, owner, slot] = self.reads.get((rank, owner, slot), 0) + 1
            self.arrived[rank, exchange] = self.arrived.get((rank, exchange), 0) + 1
        elif kind == "use":
            assert self.arrived.get((rank, what[0]), 0) >= self.size - 1, "rows are used before they have arrived"

    def run(self, choose: Callable[[int], int]) -> None:
        while possible := self.possible():
            self.step(*possible[choose(len(possible))])
        left = [
            queue[at:][:1]
            for of_rank, reached in zip(self.queues, self.at, strict=True)
            for queue, at in zip(of_rank, reached, strict=True)
            if at < len(queue)
        ]
        assert not left, f"all ranks wait: {left}"
        assert not any(self.words.values()), "flags stay up"


def streams_of(host: Host) -> list[list[tuple[int, Operation]]]:
    """Each stream's queue."""
    streams = dict.fromkeys(stream for stream, _ in host.issued)
    return [[(n, op) for n, (of, op) in enumerate(host.issued) if of is stream] for stream in streams]


def one_queue(host: Host) -> list[list[tuple[int, Operation]]]:
    """All streams in the order of issue: what a GPU short of hardware queues may do."""
    return [[(n, op) for n, (_, op) in enumerate(host.issued)]]


def world(hosts: list[Host], lay_out: Callable[[Host], list[list[tuple[int, Operation]]]]) -> World:
    return World([lay_out(host) for host in hosts], [host.after for host in hosts])
