"""What the fused kernels share: a mask reduced to the band that flash-attention understands.

Flash-attention's mask is a window around the diagonal that ends in the bottom right corner of a Sq x Sk
rectangle: query i sees key j if -left <= j - i - (Sk - Sq) <= right. It cannot say a negative bound (it reads
one as "unbounded"), and backends disagree about rows that see nothing (lse +inf, 0, -inf). Both go away when
the rectangle is first trimmed to the rows and columns that see something: bounds are then never negative and
no row is empty. All of it is decided from shapes on the host; a plain causal square or a full rectangle is
never trimmed, so it costs nothing.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads, D head width, T = B * S packed
tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from model.kernels.protocol import AttentionKernel, AttentionMask, Documents

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""dout, q, k, v, out, lse: what a backward reads, in this order; lse is contiguous."""
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv."""


@dataclass(frozen=True)
class Band:
    """Reach of a query around the bottom-right diagonal, in keys; None is unbounded, else at least 0."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        """Just the triangle, for which kernels have their fastest path."""
        return self.left is None and self.right == 0

    @property
    def flash_bounds(self) -> tuple[int, int]:
        """(left, right) with flash-attention's -1 for unbounded."""
        return -1 if self.left is None else self.left, -1 if self.right is None else self.right


@dataclass(frozen=True)
class Block:
    """The rectangle of queries x keys in which something is visible, and the band inside it."""

    queries: slice
    keys: slice
    band: Band


def visible_block(mask: AttentionMask, queries: int, keys: int) -> Block | None:
    """Trims a queries x keys rectangle to what `mask` (without documents) shows; None if it shows nothing."""
    assert mask.documents is None
    offset, window = mask.offset, mask.window
    first_query, last_query = 0, queries  # last_* are exclusive
    first_key, last_key = 0, keys
    if mask.causal:
        first_query = max(0, -offset)  # earlier queries stand before the first key
        last_key = min(keys, queries + offset)  # later keys stand after the last query
    if window is not None:
        last_query = min(queries, keys - 1 - offset + window)  # later queries have left the last key behind
        first_key = max(0, offset - window + 1)  # the first query has left earlier keys behind
    if first_query >= last_query or first_key >= last_key:
        return None
    # Bounds that reach past the rectangle from every row are dropped: unbounded is the faster kernel.
    left = right = None
    if mask.causal and last_key - 1 > first_query + offset:
        right = last_query + offset - last_key
        assert right >= 0
    if window is not None and last_query - 1 + offset - first_key >= window:
        left = last_key - last_query - offset + window - 1
        assert left >= 0
    return Block(slice(first_query, last_query), slice(first_key, last_key), Band(left, right))


class BandedKernel(AttentionKernel):
    """A kernel that computes bands: a backend implements the two methods at the end."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q.shape
        if mask.documents is not None:
            packed_q, packed_k, packed_v = (x.flatten(0, 1) for x in (q, k, v))
            band = _document_band(mask)
            out, lse = self._band_forward(packed_q, packed_k, packed_v, scale, band, mask.documents)
            return out.view(q.shape), lse.view(heads, batch, queries).transpose(0, 1)
        block = visible_block(mask, queries, k.shape[1])
        if block is None:
            return torch.zeros_like(q), _empty_rows_lse(q)
        inside = q[:, block.queries], k[:, block.keys], v[:, block.keys]
        out, lse = self._band_forward(*inside, scale, block.band, None)
        if out.shape[1] < queries:
            out = _restored(out, q, block.queries)
            lse_inside, lse = lse, _empty_rows_lse(q)
            lse[:, :, block.queries] = lse_inside
        return out, lse

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        mask: AttentionMask,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Kernels index lse by its shape and never ask for its strides, hence contiguous.
        if mask.documents is not None:
            lse = lse.transpose(0, 1).flatten(1, 2).contiguous()
            dout, out = dout.flatten(0, 1), out.flatten(0, 1)
            packed = dout, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out, lse
            band = _document_band(mask)
            dq, dk, dv = self._band_backward(packed, scale, band, mask.documents, deterministic)
            return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
        block = visible_block(mask, q.shape[1], k.shape[1])
        if block is None:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        rows, columns = block.queries, block.keys
        lse = lse[:, :, rows].contiguous()
        inside = dout[:, rows], q[:, rows], k[:, columns], v[:, columns], out[:, rows], lse
        dq, dk, dv = self._band_backward(inside, scale, block.band, None, deterministic)
        return _restored(dq, q, rows), _restored(dk, k, columns), _restored(dv, v, columns)

    @abstractmethod
    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """Attention in which no row is empty.

        Without documents q [B, Sq, H, D] and k, v [B, Sk, Hk, D] give out like q and lse [B, H, Sq]. With
        documents q [T, H, D] and k, v [T, Hk, D] give out like q and lse [H, T]: a band in each document.
        """

    @abstractmethod
    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, documents: Documents | None, deterministic: bool
    ) -> Gradients:
        """dq, dk, dv in the shapes of q, k, v, from tensors in the shapes of `_band_forward`."""


def _document_band(mask: AttentionMask) -> Band:
    assert mask.documents is not None
    narrow = mask.window is not None and mask.window < mask.documents.max_seqlen
    return Band(left=mask.window - 1 if mask.window is not None and narrow else None, right=0 if mask.causal else None)


def _empty_rows_lse(q: Tensor) -> Tensor:
    """[B, H, Sq] of -inf."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype)


def _restored(part: Tensor, whole: Tensor, positions: slice) -> Tensor:
    """`part` at `positions` of dim 1 of a tensor like `whole`, 0 elsewhere."""
    if part.shape[1] == whole.shape[1]:
        return part
    restored = torch.zeros_like(whole)
    restored[:, positions] = part
    return restored
