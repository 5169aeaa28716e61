"""Backend `torch_flash`: the FlashAttention-2 that CUDA builds of torch carry; needs no package.

The operators are the ones under `scaled_dot_product_attention` and `torch.nn.attention.varlen`, called for their
log-sum-exp and their window. Their order is [B, S, H, D], or [T, H, D] with cu_seqlens. They return tensors of their
own, and the backward makes dout and out contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.kernels.banded import Band, BandedKernel, Packing, Tensors, unit_stride
from model.kernels.cuda import missing_gpu
from model.kernels.protocol import Capabilities, Gradients, Targets

_forward_op = torch.ops.aten._flash_attention_forward
_backward_op = torch.ops.aten._flash_attention_backward


class TorchFlashKernel(BandedKernel):
    """aten::_flash_attention_forward and _flash_attention_backward (torch 2.11 and later)."""

    name = "torch_flash"
    capabilities = Capabilities(
        device_types=("cuda",), dtypes=(torch.bfloat16, torch.float16), max_head_dim=256, head_dim_multiple=8
    )

    def availability(self) -> str | None:
        missing = missing_gpu((8, 9, 10, 11, 12))
        if missing is None and not torch.backends.cuda.is_flash_attention_available():
            return f"needs a torch built with flash attention, this one ({torch.__version__}) is not"
        return missing

    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        del target  # the operator makes its own
        left, right = band.flash_bounds
        out, lse, *_ = _forward_op(
            *(unit_stride(x) for x in (q, k, v)),
            *_lengths(q, k, packing),
            0.0,  # dropout
            band.causal,
            False,  # no debug mask
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        del targets  # the operator makes its own
        left, right = band.flash_bounds
        _, q, k, *_ = tensors
        # Read only under dropout, but not optional.
        rng_state, unused = (
            torch.empty(2, dtype=torch.uint64, device=q.device),
            torch.empty(0, device=q.device),
        )
        with _deterministic_algorithms(deterministic):
            dq, dk, dv = _backward_op(
                *(unit_stride(x) for x in tensors),
                *_lengths(q, k, packing),
                0.0,  # dropout
                band.causal,
                rng_state,
                unused,
                scale=scale,
                window_size_left=left,
                window_size_right=right,
            )
        return dq, dk, dv


def _lengths(q: Tensor, k: Tensor, packing: Packing) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cu_seqlens of queries and keys, longest of each; None stands for the schema's undefined tensor."""
    if packing is None:
        return None, None, q.shape[1], k.shape[1]
    documents, key_documents = packing
    return documents.cu_seqlens, key_documents.cu_seqlens, documents.max_seqlen, key_documents.max_seqlen


@contextmanager
def _deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """The operator has no such argument and reads torch's global switch; the switch is put back."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
