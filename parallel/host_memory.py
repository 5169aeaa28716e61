"""Host memory that a GPU reads and writes by itself, beside its kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def host_buffer(size: int, device: torch.device) -> Tensor:
    """`size` bytes (uint8) of host memory, page-locked if `device` is a GPU; `release_host_buffer` gives them back."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        # Registered by hand: torch's allocator of page-locked memory rounds up to a power of two. Where the system
        # refuses, the copies are right, only slower.
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
    return buffer


def release_host_buffer(buffer: Tensor, device: torch.device) -> None:
    """Undoes what `host_buffer` did for the device. No copy may be under way."""
    if device.type == "cuda" and buffer.nbytes:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
