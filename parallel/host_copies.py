"""Copies this rank's tensors to host memory while the GPU keeps computing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.host_memory import host_buffer, release_host_buffer


class HostCopies:
    """One host buffer, page-locked where the tensors are on a GPU, which every copy uses again.

    On a GPU the copies run on a stream of their own: `take` starts them, `before_change` holds the compute stream (not
    the host) until they are made, `wait` holds the calling thread.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffer = torch.empty(0)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the fp32 `tensors`, flat, valid after `wait` and until the next call.

        The tensors must not change before `before_change` was called.
        """
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        total = sum(tensor.numel() for tensor in tensors)
        if self._buffer.numel() != total:
            release_host_buffer(self._buffer, self._device)
            self._buffer = host_buffer(4 * total, self._device).view(torch.float32)
        copies = list(self._buffer.split([tensor.numel() for tensor in tensors]))
        if self._stream is None:
            _copy(copies, tensors)
            return copies
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(copies, tensors)
            self._copied = self._stream.record_event()
        return copies

    def before_change(self) -> None:
        """To be called before the tensors change."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        """Returns when the copies are whole; any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()


def _copy(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor.detach().view(-1), non_blocking=True)
