"""What attention kernels are tried on: masks of every kind, tensors, and the definition of who sees whom.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from model.kernels import KERNELS, AttentionKernel, AttentionMask, Documents

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
