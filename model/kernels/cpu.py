"""Backend `cpu`: torch's tiled CPU attention, which never holds the score matrix of a triangle or a full
rectangle.

The operator takes grouped heads both ways. Its causal triangle starts at the top left, flash-attention's ends
at the bottom right: the two agree on squares, and any other band goes in as an additive mask of Sq x Sk
elements. Documents are run one after the other, each as its own square.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads, D head width, T = B * S packed
tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from model.kernels.banded import Band, BandedKernel, Gradients, Tensors
from model.kernels.protocol import Capabilities, Documents

_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel(BandedKernel):
    """aten::_scaled_dot_product_flash_attention_for_cpu (torch 2.11 and later) and its backward."""

    name = "cpu"
    capabilities = Capabilities(
        device_types=("cpu",), dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )

    def availability(self) -> None:
        return None

    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        if documents is None:
            return _forward(q, k, v, scale, band)
        parts = [
            _forward(q[None, start:end], k[None, start:end], v[None, start:end], scale, _fitted(band, end - start))
            for start, end in pairwise(documents.boundaries)
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, documents: Documents | None, deterministic: bool
    ) -> Gradients:
        del deterministic  # no sum depends on the order of threads: always the same bits
        if documents is None:
            return _backward(tensors, scale, band)
        *row_tensors, lse = tensors
        parts = []
        for start, end in pairwise(documents.boundaries):
            dout, q, k, v, out = (x[None, start:end] for x in row_tensors)
            parts.append(_backward((dout, q, k, v, out, lse[None, :, start:end]), scale, _fitted(band, end - start)))
        dq, dk, dv = (torch.cat([part[0] for part in gradients]) for gradients in zip(*parts, strict=True))
        return dq, dk, dv


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _forward_op(*heads_first, 0.0, **_mask_arguments(q, k, band), scale=scale)
    return out.transpose(1, 2), lse


def _backward(tensors: Tensors, scale: float, band: Band) -> Gradients:
    *row_tensors, lse = tensors
    arguments = _mask_arguments(tensors[1], tensors[2], band)
    heads_first = (x.transpose(1, 2) for x in row_tensors)
    dq, dk, dv = _backward_op(*heads_first, lse, 0.0, **arguments, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _mask_arguments(q: Tensor, k: Tensor, band: Band) -> dict[str, bool | Tensor | None]:
    queries, keys = q.shape[1], k.shape[1]
    if band.left is None and band.right is None:
        return {"is_causal": False, "attn_mask": None}
    if band.causal and queries == keys:
        return {"is_causal": True, "attn_mask": None}
    behind = torch.arange(queries, device=q.device)[:, None] + (keys - queries) - torch.arange(keys, device=q.device)
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if band.left is not None:
        hidden |= behind > band.left
    if band.right is not None:
        hidden |= behind < -band.right
    additive = torch.zeros(queries, keys, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    return {"is_causal": False, "attn_mask": additive}


def _fitted(band: Band, length: int) -> Band:
    """`band` in a document of `length` tokens: a window as long as the document is none."""
    return Band(None, band.right) if band.left is not None and band.left >= length - 1 else band
