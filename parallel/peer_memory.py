"""Memory that GPUs of one host read and write directly (torch.distributed._symmetric_memory)."""

from __future__ import annotations

import socket
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup


def reach_each_other(group: ProcessGroup, device: torch.device) -> bool:
    """Whether all of `group` are GPUs of one host that can read each other. Collective over the group."""
    if device.type != "cuda":
        return False
    places: list[tuple[str, str]] = [("", "")] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)), group)
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


_alive: weakref.WeakSet[PeerMemory] = weakref.WeakSet()


def peer_memory_allocated() -> int:
    """Bytes of this process in `PeerMemory`: on the device, beside those that torch.cuda.memory_allocated counts."""
    return sum(memory.size for memory in _alive)


class PeerMemory:
    """The same number of bytes on each rank of a group, open to all of them. Torch's allocator does not count them."""

    def __init__(self, size: int, device: torch.device, group: ProcessGroup):
        """Collective over the group, whose GPUs must `reach_each_other`."""
        torch.cuda.empty_cache()  # what torch's allocator holds unused is not to be had otherwise
        self.size = size
        _alive.add(self)
        self._memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)  # views do not keep it alive
        self._handle: Any = symmetric_memory.rendezvous(self._memory, group)

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> Tensor:
        """The memory of `rank` from its `start`-th element of `dtype` on; valid as long as this object lives."""
        return self._handle.get_buffer(rank, shape, dtype, start)

    @property
    def signal_pads(self) -> list[int]:
        """Addresses of every rank's flags."""
        return self._handle.signal_pad_ptrs
