"""Backend `cpu`: torch's tiled CPU attention, which never holds the score matrix of a triangle or a full
rectangle.

The operator takes grouped heads both ways. Its causal triangle starts at the top left, flash-attention's ends at the
bottom right: the two agree on squares, and any other band goes in as an additive mask of Sq x Sk elements. Documents
are run one after the other, each as its own rectangle.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim, Tq = B * Sq and Tk = B * Sk
packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from model.kernels.banded import Band, BandedKernel, Packing, Tensors
from model.kernels.mask import Documents
from model.kernels.protocol import Capabilities, Gradients, Targets

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
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if packing is None:
            return _forward(q, k, v, scale, band)
        out = torch.empty_like(q) if target is None else target
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for rows, columns in _document_slices(*packing):
            part, part_lse = _forward(q[None, rows], k[None, columns], v[None, columns], scale, _fitted(band, columns))
            out[rows], lse[:, rows] = part[0], part_lse[0]
        return out, lse

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        del deterministic  # no sum depends on the order of threads: always the same bits
        if packing is None:
            return _backward(tensors, scale, band)
        dout, q, k, v, out, lse = tensors
        dq, dk, dv = (
            torch.empty_like(x) if target is None else target for x, target in zip((q, k, v), targets, strict=True)
        )
        for rows, columns in _document_slices(*packing):
            row_tensors = dout[None, rows], q[None, rows], k[None, columns], v[None, columns], out[None, rows]
            parts = _backward((*row_tensors, lse[None, :, rows]), scale, _fitted(band, columns))
            dq[rows], dk[columns], dv[columns] = (part[0] for part in parts)
        return dq, dk, dv


def _document_slices(documents: Documents, key_documents: Documents) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each document."""
    for rows, columns in zip(pairwise(documents.boundaries), pairwise(key_documents.boundaries), strict=True):
        yield slice(*rows), slice(*columns)


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


def _fitted(band: Band, columns: slice) -> Band:
    """`band` in a document of these keys: a window as long as the document is none."""
    fits = band.left is not None and band.left >= columns.stop - columns.start - 1
    return Band(None, band.right) if fits else band
