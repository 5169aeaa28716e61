"""What every way of context parallelism is tested with: the cases, their dense twin, and the ranks' results beside it.

One world of eight serves every P: the ring of P is the group RINGS[P], which does not start at rank 0 and has gaps
(but for P = 8), so that a group's rank is not taken for the world's.

Shapes: B batch, S sequence, L = S / P local tokens, H query heads, K key/value heads, D head_dim; P
context_parallel_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels import KERNELS, AttentionMask, AttentionOperator, Documents
from parallel.sequence import shard_sequence
from tests.differentiable import attention

B, S, D, SCALE = 2, 96, 8, 0.3
RINGS = {1: [5], 2: [3, 6], 3: [1, 4, 6], 4: [1, 2, 5, 7], 8: list(range(8))}
NAMES = ("out", "dq", "dk", "dv")

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 19)
LONG = (1, 70, 1, 1, 23)  # one document longer than a rank's share where P > 1
UNIT = (1,) * S


@dataclass(frozen=True)
class Case:
    """`lengths`: the documents of all rows, a different cut in each row."""

    window: int | None = None
    lengths: tuple[int, ...] = ()
    heads: int = 4
    kv_heads: int = 2

    def documents(self) -> Documents | None:
        return Documents.from_boundaries([0, *accumulate(self.lengths)], "cpu") if self.lengths else None


CASES = {
    "causal": Case(),
    "causal, 8:1": Case(heads=8, kv_heads=1),
    "causal, MHA": Case(heads=3, kv_heads=3),
    "window of one": Case(window=1),
    "window smaller than a chunk": Case(window=5),  # chunks: 96, 24, 16, 12, 6
    "window of a chunk": Case(window=12),
    "window larger than a chunk": Case(window=31),
    "window that hides one pair": Case(window=S - 1),
    "window past the sequence": Case(window=S + 4),
    "documents": Case(lengths=PRIMES + LONG),
    "documents, 8:1": Case(lengths=LONG + PRIMES, heads=8, kv_heads=1),
    "documents, one row of single tokens": Case(lengths=UNIT + (S,)),
    "documents, a row whole": Case(lengths=(S, 48, 48)),
    "documents and window": Case(window=9, lengths=LONG + PRIMES),
    "documents and window of one": Case(window=1, lengths=PRIMES + LONG),
    "documents and wide window, MHA": Case(window=40, lengths=PRIMES + LONG, heads=2, kv_heads=2),
}


def full_inputs(case: Case, sequence: int = S) -> list[Tensor]:
    """q, k, v and the gradient of the output, [B, S, heads, D], fp64 that bf16 can hold: the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [torch.randn(B, sequence, n, D, generator=generator).bfloat16().double() for n in heads]


@cache
def dense(case: Case, sequence: int = S) -> list[Tensor]:
    """out, dq, dk, dv by the reference kernel over the whole sequence."""
    *leaves, dout = (tensor.requires_grad_() for tensor in full_inputs(case, sequence))
    mask = AttentionMask(window=case.window, documents=case.documents())
    out = attention(*leaves, kernel=KERNELS["math"], scale=SCALE, mask=mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def local_part(full: Tensor, group: dist.ProcessGroup) -> Tensor:
    return torch.from_numpy(shard_sequence(full.numpy(), group.size(), dist.get_rank(group)))


def results_of(
    attend: AttentionOperator, group: dist.ProcessGroup, inputs: Sequence[Tensor], case: Case, dtype: torch.dtype
) -> list[Tensor]:
    """out, dq, dk, dv [B, L, heads, D] of this rank's part of `inputs`, which are as `full_inputs` makes them."""
    q, k, v, dout = (local_part(tensor, group).to(dtype).requires_grad_() for tensor in inputs)
    out = attend(q, k, v, case.documents())
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def relative_errors(results: Sequence[Tensor], case: Case, part: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The largest error of each of `results`, relative to the largest element of the whole, or 1; `part` cuts this
    rank's tokens out of a whole tensor."""
    found = {}
    for name, result, full in zip(NAMES, results, dense(case), strict=True):
        difference = (result.double() - part(full)).abs().max()
        found[name] = (difference / full.abs().max().clamp(min=1)).item()
    return found


Results = dict[Any, dict[str, float]]


def on_rings(function: Callable[[int, dist.ProcessGroup], Results]) -> Results:
    """`function(P, ring of P)` for every ring this rank stands in."""
    found: Results = {}
    for size, ranks in RINGS.items():
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            found |= function(size, group)
    return found


def worst(results: list[Results]) -> Results:
    """Largest value over the ranks, nan if any is."""
    merged: Results = {}
    for rank_results in results:
        for key, found in rank_results.items():
            into = merged.setdefault(key, dict.fromkeys(found, 0.0))
            for name, value in found.items():
                into[name] = value if math.isnan(value) else max(into[name], value)
    return merged
