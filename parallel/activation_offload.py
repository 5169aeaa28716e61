"""Keeps activations in host memory between the forward pass and the backward pass.

A block's tensors leave for page-locked buffers while the block computes, and come back one block ahead of their use
(the host offload of ALST, arXiv:2506.13996, section 3.4). Copies run on their own stream. Streams wait for each other;
the host waits for none of them. Buffers are made in the first forward pass and reused.

    forward    computes   block i         block i + 1
               copies     out of i        out of i + 1
    backward   computes   block i + 1     block i
               copies     in of i         in of i - 1
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from parallel.host_memory import host_buffer, release_host_buffer

_SMALLEST = 4
"""A tensor of less than 1 / _SMALLEST of a block's input stays: such ones weigh little, and blocks share some."""


class ActivationOffload:
    """Keeps on the host what blocks save for the backward pass (`model.recompute.Store`)."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: dict[int, list[Tensor]] = {}
        """Host buffers that hold nothing, by their size in bytes."""
        self._block: _Block | None = None
        """The block that computes, or the last one that did."""
        self._smallest = 0
        self._made: list[Tensor] = []
        weakref.finalize(self, _give_back, self._made, device, self._stream).atexit = False

    @contextlib.contextmanager
    def block(self, hidden: Tensor) -> Iterator[None]:
        """One block's forward pass on the input `hidden`: what autograd saves in it goes to the host."""
        before = self._block
        self._block = _Block(before=weakref.ref(before) if before else None)
        self._smallest = hidden.numel() // _SMALLEST
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        """Starts to copy `tensor` to the host; parameters, and what is small or has gaps, stays where it is."""
        if isinstance(tensor, nn.Parameter) or tensor.numel() < self._smallest or not tensor.is_contiguous():
            return tensor
        block = self._block
        assert block is not None, "a tensor is packed inside a block's forward pass"
        if not block.parked and (before := block.before and block.before()):
            self._leave(before)
        parked = _Parked(block, self._buffer(tensor), tensor)
        # The buffer is free again when autograd has forgotten the tensor.
        weakref.finalize(parked, self._free[parked.buffer.nbytes].append, parked.buffer).atexit = False
        with self._copying():
            parked.on_host.copy_(tensor.detach(), non_blocking=True)
        parked.copied = self._event()
        block.parked.append(weakref.ref(parked))
        return parked

    def unpack(self, parked: Tensor | _Parked) -> Tensor:
        """The tensor on its device; that of the block before is called back meanwhile."""
        if isinstance(parked, Tensor):
            return parked
        self._call_back(parked)
        if before := parked.block.before and parked.block.before():
            for other in before.alive():
                self._call_back(other)
        assert parked.on_device is not None
        self._hold(parked.copied)
        return parked.on_device

    # -- inside --------------------------------------------------------------------------------------------------------

    def _leave(self, block: _Block) -> None:
        """Frees a block's tensors on the device, for what is issued from now on."""
        for parked in block.alive():
            self._hold(parked.copied)
            parked.on_device = None

    def _call_back(self, parked: _Parked) -> None:
        """Starts to copy a tensor to the device, if it is not there.

        A backward pass unpacks all that it saved before it frees it, so that none of this memory is given away while
        the copy writes there.
        """
        if parked.on_device is not None:
            return
        parked.on_device = torch.empty_like(parked.on_host, device=self._device)
        with self._copying():
            parked.on_device.copy_(parked.on_host, non_blocking=True)
        parked.copied = self._event()

    def _buffer(self, tensor: Tensor) -> Tensor:
        free = self._free.setdefault(tensor.nbytes, [])
        if not free:
            self._made.append(host_buffer(tensor.nbytes, self._device))
            return self._made[-1]
        return free.pop()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies come after what was issued so far, and beside what is issued next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _event(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def _hold(self, event: torch.cuda.Event | None) -> None:
        """Makes work issued from now on wait for `event`; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def _give_back(buffers: list[Tensor], device: torch.device, stream: torch.cuda.Stream | None) -> None:
    if stream is not None:
        stream.synchronize()
    for buffer in buffers:
        release_host_buffer(buffer, device)


@dataclass
class _Block:
    """One forward pass of one block. It keeps nothing alive: autograd's graph does, until it was used."""

    before: weakref.ref[_Block] | None
    parked: list[weakref.ref[_Parked]] = field(default_factory=list)

    def alive(self) -> list[_Parked]:
        return [found for reference in self.parked if (found := reference()) is not None]


class _Parked:
    """A tensor with its place on the host."""

    def __init__(self, block: _Block, buffer: Tensor, tensor: Tensor):
        self.block, self.buffer = block, buffer
        self.on_host = buffer.view(tensor.dtype).view(tensor.shape)
        self.on_device: Tensor | None = tensor.detach()
        self.copied: torch.cuda.Event | None = None
        """The last copy, in either direction."""
