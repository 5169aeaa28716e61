"""The reference kernel against two independent definitions, the CPU kernel against the reference, and the protocol.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads, D head width.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import Backend
from model.kernels import (
    BACKENDS,
    KERNELS,
    AttentionKernel,
    AttentionMask,
    Capabilities,
    Documents,
    KernelUnavailable,
    select_kernel,
)
from model.kernels.banded import visible_block
from model.kernels.cuda import import_or_reason
from model.kernels.math_reference import MathKernel, visible_pairs
from tests.differentiable import attention

B, D, SCALE = 2, 6, 0.37


def documents(*lengths: int) -> Documents:
    return Documents.from_boundaries([0, *accumulate(lengths)], "cpu")


@dataclass(frozen=True)
class Case:
    name: str
    queries: int
    keys: int
    mask: AttentionMask


PACKED = documents(1, 7, 5, 3, 1, 2, 1, 6)  # two rows of 13
CASES = [
    Case("causal square", 13, 13, AttentionMask()),
    Case("one token", 1, 1, AttentionMask()),
    Case("full square", 9, 9, AttentionMask(causal=False)),
    Case("full rectangle", 5, 13, AttentionMask(causal=False)),
    Case("full tall rectangle", 13, 5, AttentionMask(causal=False)),
    Case("window", 13, 13, AttentionMask(window=4)),
    Case("window of one", 13, 13, AttentionMask(window=1)),
    Case("window wider than the sequence", 13, 13, AttentionMask(window=20)),
    Case("window without causal", 13, 13, AttentionMask(causal=False, window=3)),
    Case("queries after the keys", 7, 7, AttentionMask(offset=7)),
    Case("queries after the keys, window", 7, 7, AttentionMask(offset=7, window=5)),
    Case("queries after the keys, window, tall", 11, 4, AttentionMask(offset=4, window=6)),
    Case("decoding: bottom right", 4, 11, AttentionMask(offset=7)),
    Case("top left", 4, 11, AttentionMask()),
    Case("keys start later", 9, 9, AttentionMask(offset=-4)),
    Case("keys start later, window", 9, 6, AttentionMask(offset=-2, window=3)),
    Case("all keys in the future", 5, 5, AttentionMask(offset=-5)),
    Case("all keys out of the window", 5, 5, AttentionMask(offset=40, window=8)),
    Case("documents", 13, 13, AttentionMask(documents=PACKED)),
    Case("documents and window", 13, 13, AttentionMask(documents=PACKED, window=3)),
    Case("documents without causal", 13, 13, AttentionMask(causal=False, documents=PACKED)),
    Case("documents of one token", 3, 3, AttentionMask(documents=documents(1, 1, 1, 1, 1, 1))),
    Case("one document a row", 13, 13, AttentionMask(documents=documents(13, 13))),
]
# Two rows: of 6 queries against 13 keys.
FEWER, MORE = documents(1, 4, 1, 2, 4), documents(1, 7, 5, 3, 10)
CHUNKED_CASES = [
    Case("more keys", 6, 13, AttentionMask(documents=FEWER, key_documents=MORE)),
    Case("more keys, window", 6, 13, AttentionMask(documents=FEWER, key_documents=MORE, window=3)),
    Case("more keys, not causal", 6, 13, AttentionMask(False, documents=FEWER, key_documents=MORE)),
    Case("more keys, one token", 1, 9, AttentionMask(documents=documents(1, 1), key_documents=documents(9, 9))),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_any_case = pytest.mark.parametrize("case", [*CASES, *CHUNKED_CASES], ids=lambda case: case.name)
by_heads = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=lambda heads: f"{heads[0]}:{heads[1]}")
by_kernel = pytest.mark.parametrize("kernel", [KERNELS["math"], KERNELS["cpu"]], ids=lambda kernel: kernel.name)


def inputs(case: Case, heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(case.queries * 100 + case.keys)

    def draw(length: int, count: int) -> Tensor:
        return torch.randn(B, length, count, D, generator=generator, dtype=torch.float64).to(dtype)

    query_heads, kv_heads = heads
    q, dout = draw(case.queries, query_heads), draw(case.queries, query_heads)
    return q, draw(case.keys, kv_heads), draw(case.keys, kv_heads), dout


def sees(mask: AttentionMask, row: int, length: int, i: int, j: int) -> bool:
    """The definition in AttentionMask's docstrings, one pair at a time."""
    if mask.documents is not None:
        cuts = mask.documents.boundaries
        if bisect_right(cuts, row * length + i) != bisect_right(cuts, row * length + j):
            return False
    distance = i + mask.offset - j
    return (not mask.causal or distance >= 0) and (mask.window is None or distance < mask.window)


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


def run(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    out, lse = kernel.forward(q, k, v, SCALE, mask)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, SCALE, mask)


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.shape == e.shape, name
        torch.testing.assert_close(
            a.to(e.dtype), e, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


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
@settings(max_examples=80, deadline=None, derandomize=True)
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


def within(like: Tensor, heads: int, positions: int, odd: int = 0) -> tuple[Tensor, Tensor]:
    """A slice shaped like `like` of a tensor with more heads and positions around it, and that tensor; all nan."""
    batch, length, count, width = like.shape
    around = like.new_full((batch, length + 2 * positions, count + 2 * heads, width + odd), math.nan)
    return around[:, positions : positions + length, heads : heads + count, odd:], around


def assert_only(target: Tensor, around: Tensor) -> None:
    """Nothing outside the target was written."""
    assert not target.isnan().any()
    assert around.isnan().sum() == around.numel() - target.numel()


by_place = pytest.mark.parametrize(
    "place", [(0, 0), (2, 0), (0, 3), (1, 2), (1, 1, 1)], ids=["whole", "heads", "positions", "both", "unaligned"]
)


@by_place
@by_kernel
@by_any_case
def test_results_are_written_where_they_are_wanted(kernel: AttentionKernel, case: Case, place: tuple[int, ...]) -> None:
    """Inputs and outputs are slices of larger tensors; the rest of those and what stood there before play no part."""
    q, k, v, dout = inputs(case, (4, 2))
    expected = run(kernel, q, k, v, dout, case.mask)
    slices = []
    for x in (q, k, v, dout):
        view, _ = within(x, *place)
        slices.append(view.copy_(x))
    q, k, v, dout = slices
    (out_target, *targets), arounds = zip(*(within(x, *place) for x in (q, q, k, v)), strict=True)
    out, lse = kernel.forward(q, k, v, SCALE, case.mask, out=out_target)
    dq, dk, dv = targets
    gradients = kernel.backward(dout, q, k, v, out, lse, SCALE, case.mask, dq=dq, dk=dk, dv=dv)
    assert out is out_target and all(a is b for a, b in zip(gradients, targets, strict=True))
    assert_near((out, lse, *gradients), expected, 1e-12)
    for target, around in zip((out, *gradients), arounds, strict=True):
        assert_only(target, around)


@by_kernel
def test_one_gradient_in_place(kernel: AttentionKernel) -> None:
    case = CASES[5]
    q, k, v, dout = inputs(case, (4, 2))
    out, lse, *expected = run(kernel, q, k, v, dout, case.mask)
    target, around = within(k, 1, 1)
    gradients = kernel.backward(dout, q, k, v, out, lse, SCALE, case.mask, dk=target)
    assert gradients[1] is target and all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert_only(target, around)


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
def test_any_strides(kernel: AttentionKernel) -> None:
    """Fused projections and [B, H, S, D] layouts hand over views; lse may come back from a merge in any layout."""
    case = CASES[0]
    q, k, v, dout = inputs(case, (4, 2))
    expected = run(kernel, q, k, v, dout, case.mask)
    q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    out, lse = kernel.forward(q, k, v, SCALE, case.mask)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    dout = torch.stack([dout, dout], -1)[..., 0]
    assert_near((out, lse, *kernel.backward(dout, q, k, v, out, lse, SCALE, case.mask)), expected, 1e-12)


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
        shown = {
            (i, j)
            for (y, i), (x, j) in product(enumerate(rows), enumerate(columns))
            if (band.left is None or x - y - shift >= -band.left)
            and (band.right is None or x - y - shift <= band.right)
        }
        assert shown == expected, mask
        assert {i for i, _ in shown} == set(rows), mask


@by_case
def test_visible_pairs_is_the_mask(case: Case) -> None:
    pairs = visible_pairs(case.mask, B, case.queries, case.keys, torch.device("cpu"))
    shape = (B, 1, 1, case.queries, case.keys)
    shown = torch.ones(shape, dtype=torch.bool) if pairs is None else pairs.expand(shape)
    for b, i, j in product(range(B), range(case.queries), range(case.keys)):
        assert shown[b, 0, 0, i, j] == sees(case.mask, b, case.queries, i, j)


class Modest(MathKernel):
    """Takes squares in fp32 on the CPU and nothing else."""

    name = "modest"
    capabilities = Capabilities(
        device_types=("cpu",),
        dtypes=(torch.float32,),
        window=False,
        documents=False,
        rectangular=False,
        max_head_dim=8,
        head_dim_multiple=2,
        deterministic=False,
    )


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (CASES[0], torch.float64, "takes float32, not float64"),
        (CASES[5], torch.float32, "has no sliding window"),
        (CASES[18], torch.float32, "has no document mask"),
        (CASES[9], torch.float32, "only over as many queries as keys with offset 0"),
        (CASES[13], torch.float32, "only over as many queries as keys with offset 0"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_a_kernel_refuses_what_it_does_not_declare(case: Case, dtype: torch.dtype, message: str) -> None:
    q, k, v, dout = inputs(case, (4, 2), dtype)
    with pytest.raises(KernelUnavailable, match=f"attention kernel modest .*{message}.*kernel math takes"):
        Modest().forward(q, k, v, SCALE, case.mask)
    out, lse = KERNELS["math"].forward(q, k, v, SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match=message):
        Modest().backward(dout, q, k, v, out, lse, SCALE, case.mask)


def test_other_refusals() -> None:
    case = CASES[0]
    q, k, v, dout = inputs(case, (4, 2), torch.float32)
    out, lse = Modest().forward(q, k, v, SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match="has no deterministic backward"):
        Modest().backward(dout, q, k, v, out, lse, SCALE, case.mask, deterministic=True)
    with pytest.raises(KernelUnavailable, match="takes head_dim up to 8, not 12"):
        Modest().forward(*(x.repeat(1, 1, 1, 2) for x in (q, k, v)), SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match="in multiples of 2, not 3"):
        Modest().forward(*(x[..., :3] for x in (q, k, v)), SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match="runs on cuda tensors, not cpu"):
        KERNELS["torch_flash"].forward(q.half(), k.half(), v.half(), SCALE, case.mask)


def test_shapes_that_do_not_fit() -> None:
    q, k, v, _ = inputs(CASES[0], (4, 2))
    kernel = KERNELS["math"]
    with pytest.raises(ValueError, match=r"q \[2, 13, 4, 6\] needs k and v of one shape .* got k \[2, 13, 3, 6\]"):
        kernel.forward(q, k[:, :, [0, 1, 0]], v[:, :, [0, 1, 0]], SCALE, AttentionMask())
    with pytest.raises(ValueError, match="needs k and v of one shape"):
        kernel.forward(q, k, v[:, 1:], SCALE, AttentionMask())
    with pytest.raises(ValueError, match="share dtype and device, got float64, float32, float64"):
        kernel.forward(q, k.float(), v, SCALE, AttentionMask())
    with pytest.raises(ValueError, match="as many queries as keys, got 6 and 13"):
        kernel.forward(q[:, :6], k, v, SCALE, AttentionMask(documents=documents(13, 13)))
    with pytest.raises(ValueError, match="hold 20 tokens but the batch holds 2 x 13 = 26"):
        kernel.forward(q, k, v, SCALE, AttentionMask(documents=documents(13, 7)))
    with pytest.raises(ValueError, match="crosses position 13"):
        kernel.forward(q, k, v, SCALE, AttentionMask(documents=documents(12, 14)))


def test_targets_that_do_not_fit() -> None:
    q, k, v, dout = inputs(CASES[0], (4, 2))
    kernel, mask = KERNELS["math"], AttentionMask()
    with pytest.raises(ValueError, match=r"out must be \[2, 13, 4, 6\] float64 on cpu, got \[2, 12, 4, 6\] float64"):
        kernel.forward(q, k, v, SCALE, mask, out=torch.empty_like(q[:, 1:]))
    with pytest.raises(ValueError, match="out must be .* float64 on cpu, got .* float32 on cpu"):
        kernel.forward(q, k, v, SCALE, mask, out=q.float())
    out, lse = kernel.forward(q, k, v, SCALE, mask)
    with pytest.raises(ValueError, match="dv must be contiguous in its last dimension, its stride there is 26"):
        sideways = v.transpose(1, 3).contiguous().transpose(1, 3)
        kernel.backward(dout, q, k, v, out, lse, SCALE, mask, dv=sideways)
    with pytest.raises(ValueError, match="dk must be"):
        kernel.backward(dout, q, k, v, out, lse, SCALE, mask, dk=torch.empty_like(q))


def test_key_documents_that_do_not_fit() -> None:
    q, k, v, _ = inputs(Case("", 6, 13, AttentionMask()), (4, 2))

    def forward(lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> None:
        mask = AttentionMask(documents=documents(*lengths), key_documents=documents(*key_lengths))
        KERNELS["math"].forward(q, k, v, SCALE, mask)

    forward((6, 6), (13, 13))
    with pytest.raises(ValueError, match="key_documents need documents"):
        AttentionMask(key_documents=documents(2))
    with pytest.raises(ValueError, match="offset 0, got 1"):
        AttentionMask(offset=1, documents=documents(2), key_documents=documents(3))
    with pytest.raises(ValueError, match="a key document for each of 2, got 3"):
        forward((6, 6), (13, 12, 1))
    with pytest.raises(ValueError, match="document 1 has 4 queries but 3 keys"):
        forward((2, 4, 6), (10, 3, 13))
    with pytest.raises(ValueError, match="hold 25 tokens but the batch holds 2 x 13 = 26"):
        forward((6, 6), (13, 12))
    with pytest.raises(ValueError, match="crosses position 13"):
        forward((6, 6), (12, 14))
    with pytest.raises(ValueError, match="the first 1 rows hold 1 documents of queries but 2 of keys"):
        forward((6, 5, 1), (7, 6, 13))


def test_masks_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"window \(0\) must be at least 1"):
        AttentionMask(window=0)
    with pytest.raises(ValueError, match="offset 0, got 3"):
        AttentionMask(offset=3, documents=documents(2))
    for boundaries in ([], [0], [1, 2], [0, 2, 2], [0, 3, 2]):
        with pytest.raises(ValueError, match="must rise strictly from 0"):
            Documents.from_boundaries(boundaries, "cpu")


def test_documents_hold_their_numbers_twice() -> None:
    packed = documents(3, 5, 1)
    assert packed.boundaries == (0, 3, 8, 9) and packed.max_seqlen == 5
    assert packed.cu_seqlens.dtype == torch.int32 and packed.cu_seqlens.tolist() == [0, 3, 8, 9]
    assert AttentionMask(documents=packed) == AttentionMask(documents=documents(3, 5, 1))


def choose(backend: str, device_type: str, dtype: torch.dtype, head_dim: int = 64) -> tuple[AttentionKernel, str]:
    return select_kernel(backend, device_type=device_type, dtype=dtype, head_dim=head_dim, window=True, documents=True)


def test_auto_on_a_cpu() -> None:
    kernel, why = choose("auto", "cpu", torch.float32)
    assert kernel.name == "cpu" and why == "attention kernel cpu: the fastest for cpu that can run"


def test_auto_passes_over_what_is_missing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_4", "flash_attn_3"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: "needs a better GPU")
    for name in ("cudnn", "flash_attn_2"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: None)
    kernel, why = choose("auto", "cuda", torch.bfloat16)
    assert kernel.name == "flash_attn_2"
    assert "flash_attn_4 needs a better GPU" in why and "torch_flash" not in why
    assert "cudnn has no sliding window" in why
    kernel, why = choose("auto", "cuda", torch.float32)
    assert kernel.name == "math" and why.startswith("WARNING: SLOW ATTENTION")
    assert "flash_attn_2 takes bfloat16, float16, not float32" in why
    kernel, why = choose("auto", "cuda", torch.bfloat16, head_dim=20)
    assert kernel.name == "math" and "in multiples of 8, not 20" in why


def test_auto_takes_cudnn_only_where_it_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_4", "flash_attn_3"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: "needs a better GPU")
    for name in ("cudnn", "flash_attn_2"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: None)

    def choice(window: bool = False, documents: bool = False, **needs: bool) -> tuple[str, str]:
        kernel, why = select_kernel(
            "auto",
            device_type="cuda",
            dtype=torch.bfloat16,
            head_dim=128,
            window=window,
            documents=documents,
            **needs,
        )
        return kernel.name, why

    assert choice()[0] == "cudnn"
    for needs, words in (
        ({"window": True}, "has no sliding window"),
        ({"documents": True}, "has no document mask"),
        ({"rectangular": True}, "takes a causal mask only over as many queries as keys"),
        ({"deterministic": True}, "has no deterministic backward"),
    ):
        name, why = choice(**needs)
        assert name == "flash_attn_2" and f"cudnn {words}" in why


@pytest.mark.parametrize(("built", "version", "words"), [(False, None, "built with cuDNN"), (True, 8907, "loads 8907")])
def test_cudnn_that_is_missing_or_old(
    built: bool, version: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.kernels.cudnn.missing_gpu", lambda capabilities: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    why = KERNELS["cudnn"].availability()
    assert why is not None and words in why
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert KERNELS["cudnn"].availability() is None


def test_a_named_backend() -> None:
    kernel, why = choose("math", "cpu", torch.float32)
    assert kernel.name == "math" and why == "attention kernel math: as configured"
    with pytest.raises(
        KernelUnavailable, match=r"flash_attn_2 cannot run: it runs on cuda tensors, not cpu\. Possible"
    ):
        choose("flash_attn_2", "cpu", torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="Possible here: auto, cpu, math"):
        choose("torch_flash", "cpu", torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="'flash' is none of auto, flash_attn_4"):
        choose("flash", "cpu", torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="no attention kernel takes float8_e4m3fn on cpu"):
        choose("auto", "cpu", torch.float8_e4m3fn)
    assert BACKENDS == (
        "auto",
        "flash_attn_4",
        "flash_attn_3",
        "cudnn",
        "flash_attn_2",
        "torch_flash",
        "cpu",
        "math",
    )
    assert get_args(Backend) == BACKENDS


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch_flash"])
def test_what_a_machine_lacks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        with pytest.raises(KernelUnavailable, match=f"attention backend {backend} cannot run") as caught:
            select_kernel(backend, device_type="cuda", dtype=torch.bfloat16, head_dim=64, window=False, documents=False)
        return str(caught.value)

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a CUDA build of torch" in refusal()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU, torch sees none" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "Tesla T4 has 7.5" in refusal()


def test_an_absent_package_and_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels").mkdir()
    (tmp_path / "broken_kernels" / "__init__.py").write_text("raise ImportError('undefined symbol: _Z3foo')")
    (tmp_path / "needy_kernels.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    package, why = import_or_reason("no_such_kernels.interface", "pip install it")
    assert package is None and why == "needs no_such_kernels.interface, which is not installed; pip install it"
    package, why = import_or_reason("broken_kernels.interface", "reinstall it")
    assert package is None and "undefined symbol: _Z3foo" in why and why.endswith("reinstall it")
    package, why = import_or_reason("needy_kernels", "install it")
    assert package is None and "No module named 'no_such_dependency'" in why
    assert import_or_reason("math", "")[0] is math
