"""The part that the fused kernels share: a mask reduced to the band that flash-attention understands.

Flash-attention's mask is a window around the diagonal that ends in the bottom right corner of a Sq x Sk rectangle:
query i sees key j if -left <= j - i - (Sk - Sq) <= right. It cannot express a negative bound (it reads one as
"unbounded"), and backends disagree about rows that see nothing (lse +inf, 0, -inf). Both problems disappear if the
rectangle is first trimmed to the rows and columns that see something: then bounds are never negative and no row is
empty. All of it is decided from shapes on the host. A plain causal square or a full rectangle is never trimmed, so it
costs nothing.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim, Tq = B * Sq and Tk = B * Sk packed
tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from model.kernels.mask import AttentionMask, Documents
from model.kernels.protocol import AttentionKernel, Gradients, Targets, placed

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""dout, q, k, v, out, lse: what a backward reads, in this order; lse is contiguous."""
Packing: TypeAlias = tuple[Documents, Documents] | None
"""Documents of the queries and of the keys, each pair aligned at its ends; None: one rectangle a batch row."""

T = TypeVar("T")
Perhaps = TypeVar("Perhaps", Tensor, Tensor | None)


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
    if first_query >= last_query:
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

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q.shape
        packing = mask.packing
        if packing is not None:
            packed_q, packed_k, packed_v = (x.flatten(0, 1) for x in (q, k, v))
            inside = _packed_target(out)
            result, lse = self._band_forward(packed_q, packed_k, packed_v, scale, _document_band(mask), packing, inside)
            return _unpacked(result, inside, q, out), lse.view(heads, batch, queries).transpose(0, 1)
        block = visible_block(mask, queries, k.shape[1])
        if block is None:
            return (torch.zeros_like(q) if out is None else out.zero_()), _empty_rows_lse(q)
        rows, columns = block.queries, block.keys
        whole = _whole(out, q, rows)
        inside = _part(whole, rows)
        trimmed = _part(q, rows), _part(k, columns), _part(v, columns)
        result, lse = self._band_forward(*trimmed, scale, block.band, None, inside)
        if lse.shape[2] < queries:
            lse_inside, lse = lse, _empty_rows_lse(q)
            lse[:, :, rows] = lse_inside
        return _restored(result, inside, whole, rows), lse

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
        targets: Targets,
    ) -> Gradients:
        # Kernels index lse by its shape and never ask for its strides, hence contiguous.
        likes, packing = (q, k, v), mask.packing
        if packing is not None:
            lse = lse.transpose(0, 1).flatten(1, 2).contiguous()
            dout, out = dout.flatten(0, 1), out.flatten(0, 1)
            packed = dout, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out, lse
            into = _three(map(_packed_target, targets))
            results = self._band_backward(packed, scale, _document_band(mask), packing, deterministic, into)
            return _three(map(_unpacked, results, into, likes, targets))
        block = visible_block(mask, q.shape[1], k.shape[1])
        if block is None:
            return _three(torch.zeros_like(x) if t is None else t.zero_() for x, t in zip(likes, targets, strict=True))
        rows, columns = block.queries, block.keys
        dout, q, out = _part(dout, rows), _part(q, rows), _part(out, rows)
        trimmed = dout, q, _part(k, columns), _part(v, columns), out, lse[:, :, rows].contiguous()
        positions = rows, columns, columns
        wholes = _three(map(_whole, targets, likes, positions))
        into = _three(map(_part, wholes, positions))
        results = self._band_backward(trimmed, scale, block.band, None, deterministic, into)
        return _three(map(_restored, results, into, wholes, positions))

    @abstractmethod
    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention in which no row is empty.

        Without packing q [B, Sq, H, D] and k, v [B, Sk, K, D] give out like q and lse [B, H, Sq]. With it q [Tq, H, D]
        and k, v [Tk, K, D] give out like q and lse [H, Tq]: a band in each document. `target` may be written and
        returned in place of a new out; one that is not returned is overwritten.
        """

    @abstractmethod
    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        """dq, dk, dv in the shapes of q, k, v, from tensors in the shapes of `_band_forward`; targets as there."""


def direct(target: Tensor | None) -> Tensor | None:
    """`target` if a kernel's 16-byte stores can go to it, else None: the kernel then makes a tensor of its own."""
    if target is None or target.data_ptr() % 16 or target.stride(-1) != 1:
        return None
    return target if all(stride * target.element_size() % 16 == 0 for stride in target.stride()[:-1]) else None


def writable(target: Tensor | None, like: Tensor) -> Tensor:
    """The target if it can be written directly, else a new tensor, contiguous whatever the strides of `like`."""
    target = direct(target)
    return torch.empty_like(like, memory_format=torch.contiguous_format) if target is None else target


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is not contiguous: what every fused kernel asks of its inputs."""
    return x if x.stride(-1) == 1 else x.contiguous()


def packing_arguments(packing: Packing) -> dict[str, int | Tensor]:
    """The documents under the names of flash-attention 3 and 4; nothing without them."""
    if packing is None:
        return {}
    documents, key_documents = packing
    return {
        "cu_seqlens_q": documents.cu_seqlens,
        "cu_seqlens_k": key_documents.cu_seqlens,
        "max_seqlen_q": documents.max_seqlen,
        "max_seqlen_k": key_documents.max_seqlen,
    }


def _document_band(mask: AttentionMask) -> Band:
    assert mask.packing is not None
    _, key_documents = mask.packing
    narrow = mask.window is not None and mask.window < key_documents.max_seqlen
    return Band(left=mask.window - 1 if mask.window is not None and narrow else None, right=0 if mask.causal else None)


def _packed_target(target: Tensor | None) -> Tensor | None:
    """[B, S, H, D] as [B * S, H, D] over the same memory; None where its strides leave no such view."""
    if target is None or (target.shape[0] > 1 and target.stride(0) != target.shape[1] * target.stride(1)):
        return None
    return target.flatten(0, 1)


def _unpacked(result: Tensor, inside: Tensor | None, like: Tensor, target: Tensor | None) -> Tensor:
    """[B * S, H, D] as [B, S, H, D]: the target itself if the kernel wrote to it."""
    return target if target is not None and result is inside else result.view(like.shape)


def _whole(target: Tensor | None, like: Tensor, positions: slice) -> Tensor | None:
    """What a result at `positions` of dim 1 is a part of: the target, a new tensor, or None if it is all there is."""
    trimmed = positions.stop - positions.start < like.shape[1]
    return torch.empty_like(like, memory_format=torch.contiguous_format) if target is None and trimmed else target


def _part(whole: Perhaps, positions: slice) -> Perhaps:
    """A part of dim 1; None of None. Views cost host time, so all of a tensor is the tensor itself."""
    return whole if whole is None or positions.stop - positions.start == whole.shape[1] else whole[:, positions]


def _restored(result: Tensor, inside: Tensor | None, whole: Tensor | None, positions: slice) -> Tensor:
    """`whole` with the result `inside` it at `positions` of dim 1 and 0 elsewhere."""
    if whole is None:
        return result
    placed(result, inside)
    if inside is not whole:
        whole[:, : positions.start].zero_()
        whole[:, positions.stop :].zero_()
    return whole


def _three(values: Iterable[T]) -> tuple[T, T, T]:
    first, second, third = values
    return first, second, third


def _empty_rows_lse(q: Tensor) -> Tensor:
    """[B, H, Sq] of -inf."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype)
