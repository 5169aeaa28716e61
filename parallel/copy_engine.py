"""Copies rows that are not contiguous by a GPU's copy engine.

torch uses the copy engine only if both ends are contiguous. Otherwise it starts a kernel, which must wait until
attention's kernel leaves it a multiprocessor. The engine itself takes rows at any fixed distance (cudaMemcpy2DAsync).
"""

from __future__ import annotations

import torch
from torch import Tensor


def copy_rows(target: Tensor, source: Tensor) -> None:
    """target.copy_(source) of [n, B, heads, D], between the memories of GPUs or within one, on the current stream."""
    if not (target.is_cuda and _rows(target) and _rows(source) and target.dtype == source.dtype):
        target.copy_(source)
        return
    from cuda.bindings import runtime  # comes with torch's CUDA builds only

    length, batch, heads, head_dim = target.shape
    size, stream = target.element_size(), torch.cuda.current_stream(target.device).cuda_stream
    for element in range(batch):
        (error,) = runtime.cudaMemcpy2DAsync(
            target.data_ptr() + element * target.stride(1) * size,
            target.stride(0) * size,
            source.data_ptr() + element * source.stride(1) * size,
            source.stride(0) * size,
            heads * head_dim * size,
            length,
            runtime.cudaMemcpyKind.cudaMemcpyDefault,
            stream,
        )
        if error != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"cudaMemcpy2DAsync failed: {error.name}")


def _rows(tensor: Tensor) -> bool:
    """Whether the heads of one token are contiguous."""
    return tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]
