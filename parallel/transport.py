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
"""(owner, reader) -> the rows of the owner's slot that the reader takes."""
Place = Callable[[int, list[Tensor]], None]
"""(owner, those rows): copies them to where they belong. The rows are valid during the call only, and best copied in
one piece: a copy engine does that beside the kernels."""


class Arrival(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Work issued from now on sees what arrived. Must be called; never blocks the host on a GPU."""


class Transport(Protocol):
    """Hands parts of tensors from rank to rank of `group`. Every rank makes the same calls in the same order."""

    group: ProcessGroup
    rank: int

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory of `like`'s dtype and device, to be filled for the next `exchange`."""

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        """Lets each peer take its rows of this rank's slot, and places those of the peers' slots.

        The tensors that `place` writes to must live until `Arrival.wait`.
        """


class MessageTransport:
    """Point-to-point messages of the group's own backend: between any ranks, on any device."""

    def __init__(self, group: ProcessGroup):
        self.group, self.rank = group, dist.get_rank(group)

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        operations, arriving = [], []
        for peer in range(self.group.size()):
            if peer == self.rank:
                continue
            address = dist.get_global_rank(self.group, peer)
            operations += [dist.P2POp(dist.isend, slot[part], address, self.group) for part in rows(self.rank, peer)]
            parts = [torch.empty_like(slot[part]) for part in rows(peer, self.rank)]
            operations += [dist.P2POp(dist.irecv, part, address, self.group) for part in parts]
            arriving.append((peer, parts))
        return _Messages(dist.batch_isend_irecv(operations) if operations else [], arriving, place)


class _Messages:
    def __init__(self, works: list[dist.Work], arriving: list[tuple[int, list[Tensor]]], place: Place):
        self.works, self.arriving, self.place = works, arriving, place

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for peer, parts in self.arriving:
            self.place(peer, parts)


class SymmetricTransport:
    """GPUs of one host read each other's memory: no message is matched and no kernel of NCCL's holds SMs.

    Slots lie in symmetric memory (torch.distributed._symmetric_memory). An exchange is a barrier on a stream of its
    own, after which every rank copies what it needs; contiguous rows go by copy engine.
    """

    _SLOTS = 4
    """A slot is written again after this many exchanges. Its readers have then passed a later barrier, see `slot`."""

    def __init__(self, group: ProcessGroup, device: torch.device):
        self.group, self.rank, self.device = group, dist.get_rank(group), device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._bytes = 0
        self._uses = 0
        self._recent: list[_Reached] = []
        """The last exchanges, the oldest first."""

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
        return self._memory[self._start() :][:size].view(like.dtype).view(tuple(shape))

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Arrival:
        start = self._start() // slot.element_size()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._handle.barrier(channel=0)
            for step in range(1, self.group.size()):  # each reader starts at another owner
                peer = (self.rank + step) % self.group.size()
                theirs = self._handle.get_buffer(peer, slot.shape, slot.dtype, start)
                place(peer, [theirs[part] for part in rows(peer, self.rank)])
            event = torch.cuda.Event()
            event.record(self._stream)
        self._uses += 1
        self._recent.append(_Reached(event, self.device))
        return self._recent[-1]

    def _start(self) -> int:
        return self._uses % self._SLOTS * self._bytes

    def _grow(self, size: int) -> None:
        """Larger slots, once for each new largest shape. Collective; waits until the old ones are out of use."""
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)
        self._recent.clear()
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
