"""Kernels write results where they are told to, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.kernels import AttentionKernel
from tests.unit.kernel_cases import CASES, SCALE, Case, assert_near, by_any_case, by_kernel, inputs, run


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
