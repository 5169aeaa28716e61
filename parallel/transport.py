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
"""(owner, reader) -> the rows of the owner's slot that the reader takes, the same in every stage."""
Place = Callable[[int, int, list[Tensor]], None]
"""(stage, owner, those rows): copies them to where they belong, and is called for this rank's own rows too. Rows are
valid during the call only, and best copied as they are: a copy engine does that beside the kernels."""
Finish = Callable[[int], None]
"""(stage): called when all owners' rows of a stage are in place."""


class Arrival(Protocol):
    """An exchange under way."""

    def wait(self, stage: int = 0) -> None:
        """Work issued from now on sees what arrived. Must be called for each stage; does not hold up a GPU's host."""


class Transport(Protocol):
    """Hands parts of tensors from rank to rank of `group`. Every rank makes the same calls in the same order."""

    group: ProcessGroup
    rank: int
    name: str

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory [stages, rows, ...] of `like`'s dtype and device, for the next `exchange`."""

    def exchange(self, slot: Tensor, rows: Rows, place: Place, finish: Finish | None = None) -> Arrival:
        """Lets every rank take its rows of every rank's slot, one stage after the other.

        The tensors that `place` and `finish` read and write must live until `Arrival.wait`.
        """


class MessageTransport:
    """Point-to-point messages of the group's own backend: between any ranks, on any device."""

    name = "by messages"

    def __init__(self, group: ProcessGroup):
        self.group, self.rank = group, dist.get_rank(group)

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def exchange(self, slot: Tensor, rows: Rows, place: Place, finish: Finish | None = None) -> Arrival:
        stages = []
        for part in slot:
            operations, arriving = [], {self.rank: [part[taken] for taken in rows(self.rank, self.rank)]}
            for peer in range(self.group.size()):
                if peer != self.rank:
                    address = dist.get_global_rank(self.group, peer)
                    sent = [part[taken] for taken in rows(self.rank, peer)]
                    arriving[peer] = [torch.empty_like(part[taken]) for taken in rows(peer, self.rank)]
                    operations += [dist.P2POp(dist.isend, piece, address, self.group) for piece in sent]
                    operations += [dist.P2POp(dist.irecv, piece, address, self.group) for piece in arriving[peer]]
            stages.append((dist.batch_isend_irecv(operations) if operations else [], arriving))
        return _Messages(stages, place, finish)


class _Messages:
    def __init__(
        self,
        stages: list[tuple[list[dist.Work], dict[int, list[Tensor]]]],
        place: Place,
        finish: Finish | None,
    ):
        self.stages, self.place, self.finish = stages, place, finish

    def wait(self, stage: int = 0) -> None:
        works, arriving = self.stages[stage]
        for work in works:
            work.wait()
        for owner, rows in arriving.items():
            self.place(stage, owner, rows)
        if self.finish:
            self.finish(stage)


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
        self._stream = torch.cuda.Stream(device, priority=-1)
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

    def exchange(self, slot: Tensor, rows: Rows, place: Place, finish: Finish | None = None) -> Arrival:
        start, size = self._start() // slot.element_size(), self.group.size()
        events = []
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._handle.barrier(channel=0)
            slots = {
                owner: slot if owner == self.rank else self._handle.get_buffer(owner, slot.shape, slot.dtype, start)
                for owner in ((self.rank + step) % size for step in range(size))  # each reader starts elsewhere
            }
            for stage in range(len(slot)):
                for owner, theirs in slots.items():
                    place(stage, owner, [theirs[stage, taken] for taken in rows(owner, self.rank)])
                if finish:
                    finish(stage)
                events.append(self._stream.record_event())
        self._uses += 1
        self._recent.append(_Reached(events, self.device))
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
    def __init__(self, events: list[torch.cuda.Event], device: torch.device):
        self.events, self.device, self.waited = events, device, False

    def wait(self, stage: int = -1) -> None:
        self.waited = self.waited or stage in (-1, len(self.events) - 1)
        torch.cuda.current_stream(self.device).wait_event(self.events[stage])


def make_transport(group: ProcessGroup, device: torch.device) -> Transport:
    """The faster transport that reaches all of `group`. Collective over the group."""
    return SymmetricTransport(group, device) if SymmetricTransport.reaches(group, device) else MessageTransport(group)
