"""The Triton forms of `parallel.fused` against the ones written in torch, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from parallel import fused
from parallel.copy_engine import copy_rows
from parallel.fused import Heads
from parallel.gradient_exchange import add_mean

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [(1, 96, 2, 128), (2, 33, 3, 128), (1, 1000, 8, 64), (3, 7, 1, 96)]
"""B, L, K, D."""


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def both_ways(run: Callable[[], list[Tensor]]) -> None:
    """Runs it with Triton and without."""
    by_triton = run()
    with mock.patch.object(fused, "_kernels", lambda *_: None):
        by_torch = run()
    assert fused._kernels(*by_triton) is not None
    for one, other in zip(by_triton, by_torch, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_keys(shape: tuple[int, int, int, int]) -> None:
    batch, length, heads, head_dim = shape
    together = tensor(batch, length + 3, 3 * heads * head_dim)
    k = together[:, :length, : heads * head_dim].unflatten(2, (heads, head_dim))
    v = together[:, 2 : length + 2, heads * head_dim : 2 * heads * head_dim].unflatten(2, (heads, head_dim))
    half = length // 2
    apart = [(0, 5, half), (half, 2 * length + 9, length - half)]
    forms: list[tuple[list[fused.Range], fused.Range | None]] = [([(0, 11, length)], None), (apart, None)]
    forms += [(apart, (start, half + 7, half - start)) for start in (0, half // 3, half - 1)]
    for own, again in forms:

        def run(own: list[fused.Range] = own, again: fused.Range | None = again) -> list[Tensor]:
            slot, buffer = torch.zeros(2, 3 * length + 20, 2, batch, heads, head_dim, device="cuda").to(k.dtype)
            fused.pack_keys(k, v, slot[:length], buffer, own, again)
            return [slot[:, 0], buffer[:, 0], slot[:, 1], buffer[:, 1]]

        both_ways(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_shares(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, heads, head_dim = shape
    draw = random.Random(length)
    for count in range(1, 11):
        cuts = [0, length] if count % 2 else [0, length // 3, length]  # one share for all positions, or two
        shares = [
            (slice(start, stop), tensor(stop - start, 2, batch, heads, head_dim, dtype=dtype))
            for start, stop in pairwise(cuts)
        ]
        while len(shares) < count:
            start = draw.randrange(length)
            stop = draw.randrange(start + 1, length + 1)
            around = tensor(stop - start + 2, 2, batch, heads, head_dim, dtype=dtype)
            shares.append((slice(start, stop), around[1:-1]))

        def run(shares: list[fused.Share] = shares) -> list[Tensor]:
            dk, dv = torch.zeros(2, batch, length + 4, heads, head_dim, device="cuda", dtype=dtype)
            fused.add_shares(dk[:, 2 : length + 2], dv[:, 4:], shares)
            return [dk, dv]

        both_ways(run)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_unpack_heads(shape: tuple[int, int, int, int], size: int) -> None:
    batch, length, heads, head_dim = shape
    q, k = tensor(batch, length, size * heads * 4, head_dim), tensor(batch, length, size * heads, head_dim)
    v = tensor(batch, length + 1, size * heads, head_dim)[:, 1:]
    three = [Heads(q, 2, 2), Heads(k, heads - 1, 1), Heads(v, 0, 1)]
    for parts in (three, [Heads(q, 1, 3)], [*three, Heads(q, 0, 4), Heads(q, 1, 2)]):
        half = length // 2
        for rank in range(size):
            own = [slice(3, 3 + half), slice(length + 5, 2 * length + 5 - half)]
            own = own if rank < size - 1 else [slice(9, 9 + length)]

            def pack(parts: list[Heads] = parts, rank: int = rank, own: list[slice] = own) -> list[Tensor]:
                w = sum(part.count for part in parts)
                slot = torch.zeros(size, length, batch, w, head_dim, device="cuda", dtype=q.dtype)
                whole = torch.zeros(size * length + 20, batch, w, head_dim, device="cuda", dtype=q.dtype)
                fused.pack_heads(parts, slot, whole, rank, own)
                return [slot.flatten(0, 1), whole]

            both_ways(pack)
            whole = tensor(size * length + 20, batch, sum(part.count for part in parts), head_dim)

            def unpack(
                parts: list[Heads] = parts, rank: int = rank, own: list[slice] = own, whole: Tensor = whole
            ) -> list[Tensor]:
                targets = [Heads(torch.zeros_like(part.tensor), part.first, part.count) for part in parts]
                fused.unpack_heads(targets, whole, own, rank, size)
                return [target.tensor for target in targets]

            both_ways(unpack)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_copied_by_the_engine(shape: tuple[int, int, int, int]) -> None:
    batch, length, heads, head_dim = shape
    source = tensor(length, batch, heads + 2, head_dim)[:, :, 1 : heads + 1]
    target, expected = torch.zeros(2, batch, length, 3 * heads, head_dim, device="cuda", dtype=source.dtype)
    copy_rows(target[:, :, heads : 2 * heads].transpose(0, 1), source)
    expected[:, :, heads : 2 * heads].transpose(0, 1).copy_(source)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("ranks", "length"), [(2, 1), (2, 10_000), (3, 4096)])
@pytest.mark.parametrize("first", [True, False])
def test_add_mean(ranks: int, length: int, dtype: torch.dtype, first: bool) -> None:
    parts, total = tensor(ranks, length, dtype=dtype), tensor(length, dtype=torch.float32)
    expected = parts.double().mean(0) + (0 if first else total.double())
    add_mean(total, parts, first=first)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
