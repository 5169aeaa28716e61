"""Page-locked host memory, which a GPU reads and writes beside its kernels."""

from __future__ import annotations

import logging
import resource

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_refused: set[torch.device] = set()
"""Devices whose first refusal has been told; the buffers after it would say the same."""


def host_buffer(size: int, device: torch.device) -> Tensor:
    """`size` bytes (uint8) of host memory, page-locked if `device` is a GPU; `release_host_buffer` gives them back.

    Where the system refuses, copies are right, but slower and not beside kernels; the first time it warns of that.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    # Locked by hand: torch's allocator of page-locked memory rounds up to a power of two.
    if device.type == "cuda" and size and (error := _lock(buffer)) and device not in _refused:
        _refused.add(device)
        log.warning(_refusal(size, device, error))
    return buffer


def release_host_buffer(buffer: Tensor, device: torch.device) -> None:
    """Undoes what `host_buffer` did for the device. No copy may be under way."""
    if device.type == "cuda" and buffer.nbytes:
        from cuda.bindings import driver  # comes with torch's CUDA builds only

        driver.cuMemHostUnregister(buffer.data_ptr())  # of a buffer that was refused it only says so


def _lock(buffer: Tensor) -> str | None:
    """The error's name, or None.

    The driver is asked, not torch's runtime: that keeps a refusal until the next kernel, which would then fail with it.
    """
    from cuda.bindings import driver  # comes with torch's CUDA builds only

    (error,) = driver.cuMemHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    return None if error == driver.CUresult.CUDA_SUCCESS else str(error.name)


def _refusal(size: int, device: torch.device, error: str) -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:,.1f} MiB"
    return (
        f"{size / 2**20:,.1f} MiB of host memory for {device} cannot be page-locked ({error}; ulimit -l: {allowed}): "
        "copies to and from it are slower, and hold up the host; raise the limit, or do without "
        "(checkpoint.asynchronous=false, training.offload_activations=none)"
    )
