"""How the ranks of one group hand each other parts of tensors: messages, or each other's memory.

A rank fills a `slot` and then calls `exchange`, as every rank of the group does, with slots of the same shape: peers
take the rows of its slot that they need. Both ends know from the shapes alone which rows those are, so nothing but data
travels.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup

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
        """Uninitialised memory of `like`'s dtype and device, for the next `exchange`."""

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        """Lets every rank take its rows of every other rank's slot.

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

    Slots lie in symmetric memory (torch.distributed._symmetric_memory). An exchange is a barrier, on a stream of the
    transport's own, after which every rank copies what it needs; rows copied as they are go by copy engine.
    """

    name = "by reading each other's memory"

    _SLOTS = 4
    """A slot is written again after this many exchanges. Its readers have then passed a later barrier, see `slot`."""

    def __init__(self, group: ProcessGroup, device: torch.device):
        self.group, self.rank, self.device = group, dist.get_rank(group), device
        self._peers = [(self.rank + step) % group.size() for step in range(1, group.size())]
        """Each reader starts with another owner."""
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._bytes = 0
        self._uses = 0
        self._recent: list[_Reached] = []
        """The last exchanges, the oldest first."""
        self._views: dict[tuple[int, int, tuple[int, ...], torch.dtype], Tensor] = {}

    @staticmethod
    def reaches(group: ProcessGroup, device: torch.device) -> bool:
        """Whether all of `group` are GPUs of one host that can read each other. Collective over the group."""
        if device.type != "cuda":
            return False
        places: list[tuple[str, str]] = [("", "")] * group.size()
        dist.all_gather_object(
            places, (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)), group
        )
        if len({host for host, _ in places}) > 1:
            return False
        visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        mine = all(
            visible.get(uuid) == device.index
            or (uuid in visible and torch.cuda.can_device_access_peer(device, visible[uuid]))
            for _, uuid in places
        )
        answers = [False] * group.size()
        dist.all_gather_object(answers, mine, group)
        return all(answers)

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        size = math.prod(shape) * like.element_size()
        if size > self._bytes:
            self._grow(size)
        # Exchange n - SLOTS + 1 began after every peer had read exchange n - SLOTS, the last that used this memory. (An
        # arrival waited for already is left alone: a CUDA graph under record may not wait for what came before it.)
        if len(self._recent) == self._SLOTS - 1 and not (earlier := self._recent.pop(0)).waited:
            earlier.wait()
        return self._slot_of(self.rank, tuple(shape), like.dtype)

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._handle.barrier(channel=0)
            for owner in self._peers:
                theirs = self._slot_of(owner, slot.shape, slot.dtype)
                place(owner, [theirs[taken] for taken in rows(owner, self.rank)])
            reached = _Reached(self._stream.record_event(), self.device)
        self._uses += 1
        self._recent.append(reached)
        return reached

    def _slot_of(self, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The present slot of `owner`. Made once for each shape: views cost the host."""
        number = self._uses % self._SLOTS
        key = number, owner, shape, dtype
        if key not in self._views:
            if len(self._views) > self._MOST_VIEWS:  # documents give every batch shapes of its own
                self._views.clear()
            start = number * self._bytes // dtype.itemsize
            self._views[key] = self._handle.get_buffer(owner, shape, dtype, start)
        return self._views[key]

    _MOST_VIEWS = 256

    def _grow(self, size: int) -> None:
        """Larger slots, once for each new largest shape. Collective; waits until the old ones are out of use."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)
        self._recent.clear()
        self._views.clear()
        self._bytes = -(-size // 512) * 512
        self._memory = symmetric_memory.empty(self._SLOTS * self._bytes, dtype=torch.uint8, device=self.device)
        self._handle = symmetric_memory.rendezvous(self._memory, self.group)


class _Reached:
    def __init__(self, event: torch.cuda.Event, device: torch.device):
        self.event, self.device, self.waited = event, device, False

    def wait(self) -> None:
        self.waited = True
        torch.cuda.current_stream(self.device).wait_event(self.event)


def make_transport(group: ProcessGroup, device: torch.device) -> Transport:
    """The faster transport that reaches all of `group`. Collective over the group."""
    return SymmetricTransport(group, device) if SymmetricTransport.reaches(group, device) else MessageTransport(group)
