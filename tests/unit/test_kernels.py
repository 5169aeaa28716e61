"""The reference kernel against two independent definitions, and the CPU kernel against the reference.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import KERNELS, AttentionKernel, AttentionMask, Documents
from model.kernels.banded import visible_block
from model.kernels.math_reference import visible_pairs
from tests.differentiable import attention
from tests.unit.kernel_cases import (
    PACKED,
    SCALE,
    B,
    Case,
    assert_near,
    by_case,
    by_heads,
    by_kernel,
    documents,
    inputs,
    run,
    sees,
)


def naive(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Row by row over only the keys that are seen; no masking arithmetic at all."""
    group = q.shape[2] // k.shape[2]
    out, lse = [], []
    for b, i, h in product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        seen = [j for j in range(k.shape[1]) if sees(mask, b, q.shape[1], i, j)]
        scores = SCALE * (k[b, seen, h // group] @ q[b, i, h])
        lse.append(torch.logsumexp(scores, 0))
        out.append(torch.softmax(scores, 0) @ v[b, seen, h // group])
    return torch.stack(out).view(q.shape), torch.stack(lse).view(q.shape[:3]).transpose(1, 2)


@by_heads
@by_case
def test_math_is_the_definition(case: Case, heads: tuple[int, int]) -> None:
    *qkv, dout = inputs(case, heads)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = naive(*leaves, case.mask)
    expected = out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)
    assert_near(run(KERNELS["math"], *qkv, dout, case.mask), expected, 1e-12)


@by_heads
@by_case
def test_math_is_scaled_dot_product_attention(case: Case, heads: tuple[int, int]) -> None:
    *qkv, dout = inputs(case, heads)
    rows = range(B)
    allowed = torch.tensor(
        [
            [[sees(case.mask, b, case.queries, i, j) for j in range(case.keys)] for i in range(case.queries)]
            for b in rows
        ]
    )
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), attn_mask=allowed[:, None], scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    gradients = torch.autograd.grad(out, leaves, dout)
    computed, _, *computed_gradients = run(KERNELS["math"], *qkv, dout, case.mask)
    for actual, expected in zip((computed, *computed_gradients), (out, *gradients), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@by_heads
@by_case
def test_cpu_is_math(case: Case, heads: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(case, heads, dtype)
    actual = run(KERNELS["cpu"], *tensors, case.mask)
    assert [x.dtype for x in (actual[0], *actual[2:])] == [dtype] * 4
    assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = run(KERNELS["math"], *(x.double() for x in tensors), case.mask)
    assert_near(actual, tuple(x.to(a.dtype) for x, a in zip(expected, actual, strict=True)), tolerance)


@by_kernel
def test_rows_that_see_nothing(kernel: AttentionKernel) -> None:
    case = Case("", 9, 6, AttentionMask(offset=-2, window=3))
    out, lse, dq, *_ = run(kernel, *inputs(case, (4, 2)), case.mask)
    empty = [i for i in range(9) if not any(sees(case.mask, 0, 9, i, j) for j in range(6))]
    assert empty == [0, 1]
    seeing = [i for i in range(9) if i not in empty]
    assert (lse[:, :, empty] == -math.inf).all() and torch.isfinite(lse[:, :, seeing]).all()
    assert (out[:, empty] == 0).all() and (dq[:, empty] == 0).all()
    assert (out[:, seeing] != 0).all() and (dq[:, seeing[1:]] != 0).all()


@by_kernel
@by_heads
def test_documents_are_separate_sequences(kernel: AttentionKernel, heads: tuple[int, int]) -> None:
    mask = AttentionMask(documents=PACKED, window=4)
    q, k, v, dout = inputs(Case("", 13, 13, mask), heads)
    out, lse, dq, dk, dv = run(kernel, q, k, v, dout, mask)
    for start, end in zip(PACKED.boundaries, PACKED.boundaries[1:], strict=False):
        row, inside = start // 13, slice(start % 13, start % 13 + end - start)
        alone = run(kernel, *(x[row, None, inside] for x in (q, k, v, dout)), AttentionMask(window=4))
        packed = (x[row, None, inside] for x in (out, lse.transpose(1, 2), dq, dk, dv))
        out_p, lse_p, *gradients_p = packed
        assert_near((out_p, lse_p.transpose(1, 2), *gradients_p), alone, 1e-12)


@st.composite
def chunked_masks(draw: st.DrawFn) -> Case:
    """Two rows cut into documents at random, each document with some keys before its first query."""
    queries, earlier = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    boundaries, key_boundaries = [0], [0]
    for row in range(B):
        cuts = sorted(draw(st.sets(st.integers(1, max(1, queries - 1)), max_size=queries - 1)))
        cuts = [cut for cut in cuts if cut < queries]
        before = sorted(draw(st.integers(0, earlier)) for _ in cuts)  # earlier keys up to each cut
        boundaries += [row * queries + cut for cut in (*cuts, queries)]
        ends = zip((*cuts, queries), (*before, earlier), strict=True)
        key_boundaries += [row * (queries + earlier) + cut + extra for cut, extra in ends]
    mask = AttentionMask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 12)),
        documents=Documents.from_boundaries(boundaries, "cpu"),
        key_documents=Documents.from_boundaries(key_boundaries, "cpu"),
    )
    return Case("drawn", queries, queries + earlier, mask)


@given(case=chunked_masks(), heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]))
@settings(max_examples=80)
@by_kernel
def test_documents_with_more_keys_are_aligned_at_their_ends(
    kernel: AttentionKernel, case: Case, heads: tuple[int, int]
) -> None:
    """Each document alone, by the definition, with the offset that the docstring names."""
    assert case.mask.documents is not None and case.mask.key_documents is not None
    q, k, v, dout = inputs(case, heads)
    actual = out, lse, dq, dk, dv = run(kernel, q, k, v, dout, case.mask)
    expected = [torch.full_like(x, math.nan) for x in actual]
    pairs = zip(pairwise(case.mask.documents.boundaries), pairwise(case.mask.key_documents.boundaries), strict=True)
    for (start, end), (key_start, key_end) in pairs:
        row, rows = start // case.queries, slice(start % case.queries, start % case.queries + end - start)
        columns = slice(key_start % case.keys, key_start % case.keys + key_end - key_start)
        offset = (key_end - key_start) - (end - start)
        alone = AttentionMask(case.mask.causal, case.mask.window, offset)
        leaves = [x[row, None, at].clone().requires_grad_() for x, at in ((q, rows), (k, columns), (v, columns))]
        out, lse = naive(*leaves, alone)
        gradients = torch.autograd.grad(out, leaves, dout[row, None, rows])
        expected[0][row, rows], expected[1][row, :, rows] = out[0].detach(), lse[0].detach()
        for whole, part, at in zip(expected[2:], gradients, (rows, columns, columns), strict=True):
            whole[row, at] = part[0]
    assert_near(actual, tuple(expected), 1e-12)


@by_kernel
def test_key_documents_like_the_queries_change_nothing(kernel: AttentionKernel) -> None:
    tensors = inputs(Case("", 13, 13, AttentionMask()), (4, 2))
    same = Documents.from_boundaries(PACKED.boundaries, "cpu")
    one = run(kernel, *tensors, AttentionMask(window=3, documents=PACKED))
    other = run(kernel, *tensors, AttentionMask(window=3, documents=PACKED, key_documents=same))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from (out, lse) over disjoint sets of them."""
    lse = torch.stack([part for _, part in parts]).logsumexp(0)
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    weights = [torch.exp(part - finite).transpose(1, 2)[..., None] for _, part in parts]
    return sum((w * out for w, (out, _) in zip(weights, parts, strict=True)), torch.zeros(())), lse


@pytest.mark.parametrize(
    "mask",
    [AttentionMask(), AttentionMask(causal=False), AttentionMask(window=5), AttentionMask(window=5, offset=-3)],
    ids=str,
)
@pytest.mark.parametrize("cut", [1, 6, 12])
@by_heads
@by_kernel
def test_halves_of_the_keys_make_the_whole(
    kernel: AttentionKernel, heads: tuple[int, int], cut: int, mask: AttentionMask
) -> None:
    q, k, v, dout = inputs(Case("", 13, 13, mask), heads)
    whole = run(kernel, q, k, v, dout, mask)
    halves = []
    for keys, offset in ((slice(None, cut), mask.offset), (slice(cut, None), mask.offset - cut)):
        half_mask = AttentionMask(causal=mask.causal, window=mask.window, offset=offset)
        halves.append((k[:, keys], v[:, keys], half_mask))
    out, lse = merged([kernel.forward(q, k, v, SCALE, half_mask) for k, v, half_mask in halves])
    gradients = [kernel.backward(dout, q, k, v, out, lse, SCALE, half_mask) for k, v, half_mask in halves]
    (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = gradients
    assert_near((out, lse, dq_a + dq_b, torch.cat([dk_a, dk_b], 1), torch.cat([dv_a, dv_b], 1)), whole, 1e-12)


@by_kernel
@by_case
def test_attention_gradcheck(kernel: AttentionKernel, case: Case) -> None:
    *qkv, _ = inputs(case, (2, 1))
    leaves = [x[..., :2].clone().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, kernel=kernel, scale=SCALE, mask=case.mask), leaves
    )


def test_repeated_backward_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, 128, 8, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 128, 1, 16, generator=generator) for _ in range(2))
    runs = [run(KERNELS["cpu"], q, k, v, dout, AttentionMask()) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_visible_block_is_the_mask() -> None:
    """Every small mask: the trimmed band shows exactly the mask's pairs, has no empty row, no negative bound."""
    windows = [None, *range(1, 7)]
    for queries, keys, offset, window, causal in product(
        range(1, 5), range(1, 6), range(-6, 9), windows, [True, False]
    ):
        mask = AttentionMask(causal=causal, window=window, offset=offset)
        expected = {(i, j) for i in range(queries) for j in range(keys) if sees(mask, 0, queries, i, j)}
        block = visible_block(mask, queries, keys)
        if block is None:
            assert not expected
            continue
        rows, columns, band = range(queries)[block.queries], range(keys)[block.keys], block.band
        assert all(bound is None or bound >= 0 for bound in (band.left, band.right))
        shift = len(columns) - len(rows)
        # A bound that hides nothing costs a slower kernel: the last row does not see the first column, or vice versa.
        assert band.left is None or -(len(rows) - 1) - shift < -band.left
        assert band.right is None or len(columns) - 1 - shift > band.right
        shown = {
            (i, j)
            for (y, i), (x, j) in product(enumerate(rows), enumerate(columns))
            if (band.left is None or x - y - shift >= -band.left)
            and (band.right is None or x - y - shift <= band.right)
        }
        assert shown == expected, mask
        assert {i for i, _ in shown} == set(rows) and {j for _, j in shown} == set(columns), mask


@by_case
def test_visible_pairs_is_the_mask(case: Case) -> None:
    pairs = visible_pairs(case.mask, B, case.queries, case.keys, torch.device("cpu"))
    shape = (B, 1, 1, case.queries, case.keys)
    shown = torch.ones(shape, dtype=torch.bool) if pairs is None else pairs.expand(shape)
    for b, i, j in product(range(B), range(case.queries), range(case.keys)):
        assert shown[b, 0, 0, i, j] == sees(case.mask, b, case.queries, i, j)


def test_documents_hold_their_numbers_twice() -> None:
    packed = documents(3, 5, 1)
    assert packed.boundaries == (0, 3, 8, 9) and packed.max_seqlen == 5
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [0, 3, 8, 9]
    assert AttentionMask(documents=packed) == AttentionMask(documents=documents(3, 5, 1))
