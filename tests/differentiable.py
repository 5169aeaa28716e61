"""A kernel under any mask as a differentiable function.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.mask import AttentionMask
from model.kernels.protocol import AttentionKernel


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: AttentionKernel,
        scale: float,
        mask: AttentionMask,
        deterministic: bool,
    ) -> Tensor:
        out, lse = kernel.forward(q, k, v, scale, mask)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.scale, ctx.mask, ctx.deterministic = kernel, scale, mask, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = ctx.kernel.backward(dout, q, k, v, out, lse, ctx.scale, ctx.mask, ctx.deterministic)
        return *gradients, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel: AttentionKernel,
    scale: float,
    mask: AttentionMask,
    deterministic: bool = False,
) -> Tensor:
    """softmax(scale * q k^T + mask) v by `kernel`, differentiable once.

    Args:
        q: [B, Sq, H, D]; k, v: [B, Sk, K, D], K dividing H.
        deterministic: the backward gives the same bits every time.

    Returns:
        [B, Sq, H, D] in q's dtype; rows that see no key are 0.

    Raises:
        KernelUnavailable: the kernel does not take this dtype, device or mask.
        ValueError: shapes that do not fit.
    """
    return cast(Tensor, _Attention.apply(q, k, v, kernel, scale, mask, deterministic))
