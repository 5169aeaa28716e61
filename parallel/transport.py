"""Moves parts of tensors between the ranks of one group, by messages or through each other's memory.

A rank asks for a `slot`, fills it and calls `exchange`. Every rank of the group does so, with slots of the same shape.
Peers take the rows of its slot that they need. Both ends know from the shapes which rows those are, so only data
travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.peer_flags import Flags
from parallel.peer_memory import PeerMemory, reach_each_other

Rows = Callable[[int, int], list[slice]]
"""(owner, reader) -> the rows of the owner's slot that the reader takes; the two are never the same rank."""
Place = Callable[[int, list[Tensor]], None]
"""(owner, those rows): copies them to where they belong. Rows are valid during the call only, and best copied as they
are: a copy engine does that beside the kernels."""


class Arrival(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Work issued from now on sees what arrived. Must be called; does not hold up a GPU's host."""


class Transport(Protocol):
    """Hands parts of tensors from rank to rank of `group`. Every rank makes the same calls in the same order."""

    group: ProcessGroup
    rank: int
    name: str

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory of `like`'s dtype and device, for the next `exchange`, which comes before the next slot.

        All ranks ask for the same shape. What it holds can be read until the fourth slot after it is asked for, or a
        larger one.

        From now on peers' rows may arrive, whatever this rank is given to do before it calls `exchange`. So what
        `place` writes is allocated before, and nothing else writes there until `Arrival.wait`.
        """

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        """Offers this rank's rows of its slot to every other rank, and takes those that others offer.

        The tensors that `place` writes must live until `Arrival.wait`.
        """


class MessageTransport:
    """Point-to-point messages of the group's own backend: between any ranks, on any device."""

    name = "by messages"

    def __init__(self, group: ProcessGroup):
        self.group, self.rank = group, dist.get_rank(group)

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        operations, arriving = [], {}
        for peer in range(self.group.size()):
            if peer != self.rank:
                address = dist.get_global_rank(self.group, peer)
                sent = [slot[taken] for taken in rows(self.rank, peer)]
                arriving[peer] = [torch.empty_like(slot[taken]) for taken in rows(peer, self.rank)]
                operations += [dist.P2POp(dist.isend, piece, address, self.group) for piece in sent]
                operations += [dist.P2POp(dist.irecv, piece, address, self.group) for piece in arriving[peer]]
        return _Messages(dist.batch_isend_irecv(operations) if operations else [], arriving, place)


class _Messages:
    def __init__(self, works: list[dist.Work], arriving: dict[int, list[Tensor]], place: Place):
        self.works, self.arriving, self.place = works, arriving, place

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for owner, rows in self.arriving.items():
            self.place(owner, rows)


class SymmetricTransport:
    """GPUs of one host read each other's memory: no message is matched and no kernel of NCCL's holds SMs.

    Slots lie in `PeerMemory`, a few in turn. An offer is a flag raised on the
    current stream, behind the work that filled the slot. Taking waits for every owner's flag, copies, and lowers the
    flag, on a stream of the transport's own that knows nothing of this rank's work since `slot`: who is late with its
    own work does not begin to copy late. Rows copied as they are go by copy engine.

    No slot is overwritten before it was read, however far apart the ranks are, whatever order CUDA graphs of several
    exchanges are replayed in: `slot` waits until all readers have lowered the flag of its last use.

    Nobody waits for ever: every rank issues slot 0, offer 0, take 0, slot 1, and so on, and each of these waits only
    for peers' work that stands before it in this order: a take for offers of the same number, a slot for takes of an
    earlier one. So the first of all the ranks' unfinished ones can always go on, even were a GPU to run all it is given
    in the order of issue, and even where a host waits for its GPU in between.
    """

    name = "by reading each other's memory"

    _SLOTS = 4

    def __init__(self, group: ProcessGroup, device: torch.device):
        self.group, self.rank, self.device = group, dist.get_rank(group), device
        self._peers = [(self.rank + step) % group.size() for step in range(1, group.size())]
        """Each reader starts with another owner."""
        self._takes = torch.cuda.Stream(device, priority=-1)
        self._memory: PeerMemory  # with the flags, from the first slot on
        self._flags: list[Flags]
        """The flags of each slot."""
        self._bytes = 0
        self._uses = 0
        self._recent: list[_Taken] = []
        """The last exchanges, the oldest first."""
        self._views: dict[tuple[int, int, tuple[int, ...], torch.dtype], Tensor] = {}
        self._captured = False
        self._in_graphs: list[PeerMemory] = []
        """Memory that has been outgrown, but is written and read by CUDA graphs."""

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        size = math.prod(shape) * like.element_size()
        if size > self._bytes:
            self._grow(size)
        # CUDA may run a graph's branches in any order that its edges allow, so there the order of issue becomes edges:
        # here, and in `exchange`. (One waited for already is left alone: it may be from before the graph.)
        if len(self._recent) == self._SLOTS and not (earlier := self._recent.pop(0)).waited:
            earlier.wait()
        stream = torch.cuda.current_stream(self.device)
        self._flags[self._number].await_all_lowered.issue(stream)
        self._takes.wait_stream(stream)
        return self._slot_of(self.rank, tuple(shape), like.dtype)

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        stream, flags = torch.cuda.current_stream(self.device), self._flags[self._number]
        flags.raise_all.issue(stream)
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
            self._takes.wait_stream(stream)
        with torch.cuda.stream(self._takes):
            for owner in self._peers:
                flags.await_raised[owner].issue(self._takes)
                theirs = self._slot_of(owner, slot.shape, slot.dtype)
                place(owner, [theirs[taken] for taken in rows(owner, self.rank)])
                flags.lower[owner].issue(self._takes)
            taken_all = _Taken(self._takes.record_event(), self.device)
        self._uses += 1
        self._recent.append(taken_all)
        return taken_all

    @property
    def _number(self) -> int:
        """The number of the present slot."""
        return self._uses % self._SLOTS

    def _slot_of(self, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The present slot of `owner`. Made once for each shape: views cost the host."""
        key = self._number, owner, shape, dtype
        if key not in self._views:
            if len(self._views) > self._MOST_VIEWS:  # documents give every batch shapes of its own
                self._views.clear()
            start = self._number * self._bytes // dtype.itemsize
            self._views[key] = self._memory.view(owner, shape, dtype, start)
        return self._views[key]

    _MOST_VIEWS = 256

    def _grow(self, size: int) -> None:
        """Larger slots, once for each new largest shape. Collective; waits until the old ones are out of use."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)
        self._recent.clear()
        self._views.clear()
        if self._captured:
            self._in_graphs.append(self._memory)
        self._captured = False
        self._bytes = -(-size // 512) * 512
        self._memory = PeerMemory(self._SLOTS * self._bytes, self.device, self.group)
        self._flags = [Flags(self._memory.signal_pads, self.rank, slot) for slot in range(self._SLOTS)]


class _Taken:
    def __init__(self, event: torch.cuda.Event, device: torch.device):
        self.event, self.device, self.waited = event, device, False

    def wait(self) -> None:
        self.waited = True
        torch.cuda.current_stream(self.device).wait_event(self.event)


def make_transport(group: ProcessGroup, device: torch.device) -> Transport:
    """The faster transport that reaches all of `group`. Collective over the group."""
    return SymmetricTransport(group, device) if reach_each_other(group, device) else MessageTransport(group)
