"""The functions of `parallel.fused` in Triton; what each does is written there. Imported on machines with GPUs only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from parallel.fused import Heads, Range, Share

MOST_SHARES = 8
"""That one launch of `add_shares` takes."""

_ROWS = 16
_COLUMNS = 512


def pack_keys(k: Tensor, v: Tensor, slot: Tensor, buffer: Tensor, own: Sequence[Range], again: Range | None) -> None:
    batch, length, heads, head_dim = k.shape
    (_, first, first_length), (_, second, _) = own[0], own[-1]
    width = heads * head_dim
    grid = triton.cdiv(length * batch, _ROWS), triton.cdiv(width, _COLUMNS)
    rows = k.stride(1), k.stride(0), v.stride(1), v.stride(0)
    _pack_keys[grid](
        k, v, slot, buffer, length * batch, batch, width, *rows, first_length, first, second,
        *(again or (0, 0, 0)), _ROWS, _COLUMNS,
    )  # fmt: skip


# Positions follow the documents: specialised on, each new value could compile anew.
@triton.jit(do_not_specialize=["rows", "first_length", "first", "second", "again", "third", "third_length"])
def _pack_keys(
    k, v, slot, buffer, rows, batch, width, k_row, k_batch, v_row, v_batch, first_length, first, second,
    again, third, third_length, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None]
    token, element = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)
    keys = tl.load(k + (token * k_row + element * k_batch)[:, None] + column, mask=inside)
    values = tl.load(v + (token * v_row + element * v_batch)[:, None] + column, mask=inside)
    place = tl.where(token < first_length, first + token, second + token - first_length)
    there = ((2 * token * batch + element) * width)[:, None] + column
    here = ((2 * place * batch + element) * width)[:, None] + column
    tl.store(slot + there, keys, mask=inside)
    tl.store(slot + there + batch * width, values, mask=inside)
    tl.store(buffer + here, keys, mask=inside)
    tl.store(buffer + here + batch * width, values, mask=inside)
    inside &= ((token >= again) & (token < again + third_length))[:, None]
    here = ((2 * (third + token - again) * batch + element) * width)[:, None] + column
    tl.store(buffer + here, keys, mask=inside)
    tl.store(buffer + here + batch * width, values, mask=inside)


def add_shares(dk: Tensor, dv: Tensor, shares: Sequence[Share]) -> None:
    batch, length, heads, head_dim = dk.shape
    width = heads * head_dim
    grid = triton.cdiv(length * batch, _ROWS), triton.cdiv(width, _COLUMNS), 2
    strides = dk.stride(1), dk.stride(0), dv.stride(1), dv.stride(0)
    unused = (slice(0, 0), shares[0][1])
    described = []
    for where, share in (*shares, *[unused] * (MOST_SHARES - len(shares))):
        described += [share, where.start, where.stop]
    _add_shares[grid](dk, dv, length * batch, batch, width, *strides, *described, len(shares), _ROWS, _COLUMNS)


@triton.jit(do_not_specialize=["rows", *(f"{end}{i}" for i in range(MOST_SHARES) for end in ("start", "stop"))])
def _add_shares(
    dk, dv, rows, batch, width, k_row, k_batch, v_row, v_batch,
    share0, start0, stop0, share1, start1, stop1, share2, start2, stop2, share3, start3, stop3,
    share4, start4, stop4, share5, start5, stop5, share6, start6, stop6, share7, start7, stop7,
    SHARES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None]
    which = tl.program_id(2)  # keys or values
    token, element = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)
    in_share = (((2 * token + which) * batch + element) * width)[:, None] + column
    total = _part(share0, start0, stop0, token, in_share, inside, batch * width)
    if SHARES > 1:
        total += _part(share1, start1, stop1, token, in_share, inside, batch * width)
    if SHARES > 2:
        total += _part(share2, start2, stop2, token, in_share, inside, batch * width)
    if SHARES > 3:
        total += _part(share3, start3, stop3, token, in_share, inside, batch * width)
    if SHARES > 4:
        total += _part(share4, start4, stop4, token, in_share, inside, batch * width)
    if SHARES > 5:
        total += _part(share5, start5, stop5, token, in_share, inside, batch * width)
    if SHARES > 6:
        total += _part(share6, start6, stop6, token, in_share, inside, batch * width)
    if SHARES > 7:
        total += _part(share7, start7, stop7, token, in_share, inside, batch * width)
    if which == 0:
        tl.store(dk + (token * k_row + element * k_batch)[:, None] + column, total.to(dk.dtype.element_ty), mask=inside)
    else:
        tl.store(dv + (token * v_row + element * v_batch)[:, None] + column, total.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _part(share, start, stop, token, in_share, inside, half_row):
    covered = ((token >= start) & (token < stop))[:, None]
    before = (start * 2).to(tl.int64) * half_row
    return tl.load(share + in_share - before, mask=inside & covered, other=0.0).to(tl.float32)


_TENSORS = 3
"""That one launch of `pack_heads` takes."""


def pack_heads(parts: Sequence[Heads], slot: Tensor, whole: Tensor, rank: int, own: Sequence[slice]) -> None:
    size, length, batch, heads, head_dim = slot.shape
    _move_heads(parts, slot, whole, own, rank, size, (length, batch, heads, head_dim), packing=True)


def unpack_heads(parts: Sequence[Heads], whole: Tensor, own: Sequence[slice], rank: int, size: int) -> None:
    _, batch, heads, head_dim = whole.shape
    length = parts[0].tensor.shape[1]
    _move_heads(parts, whole, whole, own, rank, size, (length, batch, heads, head_dim), packing=False)


def _move_heads(
    parts: Sequence[Heads], slot: Tensor, whole: Tensor, own: Sequence[slice], rank: int, size: int,
    shape: tuple[int, int, int, int], packing: bool,
) -> None:  # fmt: skip
    length, batch, heads, head_dim = shape
    half, low, high = own[0].stop - own[0].start, own[0].start, own[-1].start
    start = 0
    for some in (parts[i : i + _TENSORS] for i in range(0, len(parts), _TENSORS)):
        described, counts = [], [part.count for part in some] + [0] * (_TENSORS - len(some))
        for part in (*some, *[some[0]] * (_TENSORS - len(some))):
            tensor = part.tensor
            described += [tensor, tensor.stride(1), tensor.stride(0), tensor.shape[2] // size, part.first]
        grid = triton.cdiv(length * batch, _HEAD_ROWS), size if packing else 1, sum(counts)
        _heads[grid](
            *described, slot, whole, length, batch, heads, start, rank, half, low, high,
            *counts, packing, head_dim, triton.next_power_of_2(head_dim), _HEAD_ROWS,
        )  # fmt: skip
        start += sum(counts)


_HEAD_ROWS = 64


@triton.jit(do_not_specialize=["first0", "first1", "first2", "start", "rank", "half", "low", "high"])
def _heads(
    x0, row0, batch0, heads0, first0, x1, row1, batch1, heads1, first1, x2, row2, batch2, heads2, first2,
    slot, whole, length, batch, heads, start, rank, half, low, high,
    COUNT0: tl.constexpr, COUNT1: tl.constexpr, COUNT2: tl.constexpr, PACKING: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(2)
    peer = tl.program_id(1) if PACKING else rank
    column = tl.arange(0, COLUMNS)[None]
    token, element = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    inside = (token < length)[:, None] & (column < D)
    place = tl.where(token < half, low + token, high + token - half)  # of this rank's tokens among all
    in_whole = (((place * batch + element) * heads + start + head) * D)[:, None] + column
    in_slot = ((((peer * length + token) * batch + element) * heads + start + head) * D)[:, None] + column
    if head < COUNT0:
        at = token * row0 + element * batch0 + (peer * heads0 + first0 + head) * D
        _move(x0 + at[:, None] + column, slot + in_slot, whole + in_whole, inside, peer == rank, PACKING)
    elif head < COUNT0 + COUNT1:
        at = token * row1 + element * batch1 + (peer * heads1 + first1 + head - COUNT0) * D
        _move(x1 + at[:, None] + column, slot + in_slot, whole + in_whole, inside, peer == rank, PACKING)
    else:
        at = token * row2 + element * batch2 + (peer * heads2 + first2 + head - COUNT0 - COUNT1) * D
        _move(x2 + at[:, None] + column, slot + in_slot, whole + in_whole, inside, peer == rank, PACKING)


@triton.jit
def _move(x, slot, whole, inside, own, PACKING: tl.constexpr):
    if not PACKING:
        tl.store(x, tl.load(whole, mask=inside), mask=inside)
    elif own:
        tl.store(whole, tl.load(x, mask=inside), mask=inside)
    else:
        tl.store(slot, tl.load(x, mask=inside), mask=inside)


def add_mean(total: Tensor, parts: Tensor, *, first: bool) -> None:
    """`parallel.gradient_exchange.add_mean`."""
    size, length = parts.shape
    _add_mean[(triton.cdiv(length, _ELEMENTS),)](total, parts, length, 1 / size, first, size, _ELEMENTS, num_warps=8)


_ELEMENTS = 4096


@triton.jit
def _add_mean(total, parts, length, share, FIRST: tl.constexpr, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < length
    added = tl.load(parts + at, mask=inside).to(tl.float32)
    for _ in tl.static_range(1, SIZE):
        parts += length  # to the next rank's; a length of 1 is a constant here, which has no methods
        added += tl.load(parts + at, mask=inside).to(tl.float32)
    added *= share
    if not FIRST:
        added += tl.load(total + at, mask=inside)
    tl.store(total + at, added, mask=inside)
