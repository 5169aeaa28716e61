"""Cuts a sequence over context-parallel ranks: in zigzag order, or so that documents balance.

Shapes: B batch, S sequence, P context_parallel_size.

Zigzag: the sequence is cut into 2P equal chunks and rank r holds chunks r and 2P-1-r. Under a causal mask every rank
then has the same number of (query, key) pairs to compute at every step of the ring (Striped Attention's balance,
arXiv:2311.09431, kept with contiguous chunks).

Balanced cut: packed documents upset that balance, because a token sees only its document. Besides, the last rank's
chunks are neighbours, one chunk to an attention kernel, while the others pay for a second one. So if nothing but an
exchange of keys relies on the cut, the cut changes: each rank still takes one piece from either end of what the ranks
before it left, S / P tokens together, but only as much from the left as gives it its share of the work.

Labels are shifted before the cut, so that no rank needs its neighbour's token. Sequence parallelism cuts a rank's
tokens again, in their local order, over its tensor-parallel peers (`parallel.tensor.Region`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

Part = list[tuple[int, int]]
"""What one rank holds: the positions [start, stop) of one range or two, in its local order."""

_STEPS = 128
"""So finely a balanced cut is chosen, in parts of a rank's tokens."""
_TILE = 128
"""Tokens of the tiles that kernels compute."""
_SECOND_CHUNK, _SECOND_CHUNK_TOKENS = 10_000, 8192
"""Pairs that a rank's second chunk costs beside its own, for each token of a chunk, up to so many, and divided by the
query heads: about 0.6 of a tile of 128 keys on each of an H200's 132 multiprocessors, which idle while a kernel, or a
long document in it, ends. Of two ranks that share plain causal attention the one with two chunks took 0.04, 0.09, 0.21
and 0.25 ms longer (flash_attn_4, forward + backward, 32 heads, chunks of 1,024 to 8,192 tokens; 0.21 with 8 heads and
8,192), and no longer with chunks of 16,384."""
_FETCHED = 256
"""Pairs that cost as much as fetching a key and sending its gradient home: 924 / (H / K) on an H200 over NVLink."""


def check_sequence_length(sequence_length: int, context_parallel_size: int) -> None:
    """Raises ValueError unless the sequence cuts into 2P equal chunks (P > 1; one rank takes any length)."""
    chunks = 2 * context_parallel_size
    if context_parallel_size > 1 and sequence_length % chunks:
        below = sequence_length // chunks * chunks
        raise ValueError(
            f"sequence_length ({sequence_length}) must be divisible by 2 x context_parallel_size "
            f"(2 x {context_parallel_size} = {chunks}); nearest valid lengths: "
            f"{f'{below}, ' if below else ''}{below + chunks}"
        )


def check_sequence_parallel(sequence_length: int, context_parallel_size: int, tensor_parallel_size: int) -> None:
    """Raises ValueError unless the tensor-parallel ranks can share a context-parallel rank's tokens evenly."""
    ranks = context_parallel_size * tensor_parallel_size
    if sequence_length % ranks:
        unit = math.lcm(ranks, 2 * context_parallel_size if context_parallel_size > 1 else 1)
        below = sequence_length // unit * unit
        raise ValueError(
            f"sequence_length ({sequence_length}) must be divisible by context_parallel_size x tensor_parallel_size "
            f"({context_parallel_size} x {tensor_parallel_size} = {ranks}) for sequence_parallel; nearest valid "
            f"lengths: {f'{below}, ' if below else ''}{below + unit}; or set parallel.sequence_parallel=false"
        )


def causal_pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs that causality and the window leave in one head over a whole sequence."""
    reach = min(tokens, window or tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def chunk_starts(sequence_length: int, context_parallel_size: int, cp_rank: int) -> list[int]:
    """First positions of the chunks that `cp_rank` holds, in their local order; one chunk of S where P is 1."""
    if context_parallel_size == 1:
        return [0]
    chunk = sequence_length // (2 * context_parallel_size)
    return [chunk * cp_rank, chunk * (2 * context_parallel_size - 1 - cp_rank)]


def zigzag_parts(sequence_length: int, context_parallel_size: int) -> list[Part]:
    """Each rank's part, documents or not."""
    chunk = sequence_length // (2 * context_parallel_size) if context_parallel_size > 1 else sequence_length
    return [
        _ranges(*((start, start + chunk) for start in chunk_starts(sequence_length, context_parallel_size, rank)))
        for rank in range(context_parallel_size)
    ]


@lru_cache(maxsize=16)
def causal_parts(
    sequence_length: int, context_parallel_size: int, query_heads: int, window: int | None = None
) -> list[Part]:
    """Each rank's part of sequences without documents: the zigzag, but that the last rank, which has one chunk, does
    more of the work, by whole tiles; under a window no longer than half a part one chunk each. `query_heads` are those
    that a kernel call computes, of all rows of a batch. Remembered: every micro-batch asks, and the search takes 10 ms
    at 524,288 tokens."""
    length = sequence_length // context_parallel_size
    second = _SECOND_CHUNK * min(length // 2, _SECOND_CHUNK_TOKENS) // query_heads
    narrow = window is not None and window <= length // 2
    lefts = [*range(length // 2 % _TILE, length, _TILE), *([length] if narrow else [])]
    return _parts(sequence_length, context_parallel_size, [0, sequence_length], window, lambda *_: lefts, second)


def balanced_parts(
    sequence_length: int, context_parallel_size: int, boundaries: Sequence[int], window: int | None = None
) -> list[Part]:
    """Each rank's part of one sequence with documents 0 = b0 < b1 < ... < S: the zigzag where there is only one."""
    if len(boundaries) == 2:
        return zigzag_parts(sequence_length, context_parallel_size)
    length = sequence_length // context_parallel_size

    def lefts(low: int, high: int) -> Iterable[int]:
        shift = high - length - low  # a cut at low + left is one at low + left + shift
        ends = {bound - low - moved for bound in boundaries for moved in (0, shift)}  # where no document is cut
        even = range(length // 2 % (step := max(1, length // _STEPS)), length, step)
        return {0, length, *even, *(left for left in ends if 0 <= left <= length)}

    return _parts(sequence_length, context_parallel_size, boundaries, window, lefts)


def _parts(
    sequence_length: int,
    context_parallel_size: int,
    boundaries: Sequence[int],
    window: int | None,
    lefts: Callable[[int, int], Iterable[int]],
    second: int = 0,
) -> list[Part]:
    """Of the cuts that take one of `lefts(low, high)` tokens from the left of what is left, [low, high), the one whose
    busier side, and what the sides fetch of each other, cost least. A rank's second piece costs `second`."""
    length = sequence_length // context_parallel_size
    work, cut_off = _work(boundaries, window), _cut_off(boundaries, window)
    low, high, parts = 0, sequence_length, []
    for others in range(context_parallel_size - 1, 0, -1):
        whole = work(high) - work(low)

        def cost(left: int, low: int = low, high: int = high, whole: int = whole, others: int = others) -> float:
            first, last = low + left, high - (length - left)
            mine = work(first) - work(low) + work(high) - work(last)
            busier = max(mine + second * (left < length), (whole - mine + (others - 1) * second) / others)
            return busier + _FETCHED * max(cut_off(first), cut_off(last))

        left = min(sorted(lefts(low, high), key=lambda left: abs(2 * left - length)), key=cost)  # or the most even
        parts.append(_ranges((low, low + left), (high - (length - left), high)))
        low, high = low + left, high - (length - left)
    return [*parts, [(low, high)]]


def _cut_off(boundaries: Sequence[int], window: int | None) -> Callable[[int], int]:
    """A function: how many keys before a position are seen from there on."""

    def cut_off(position: int) -> int:
        seen = position - boundaries[bisect_right(boundaries, position) - 1]
        return seen if window is None else min(seen, window - 1)

    return cut_off


def _work(boundaries: Sequence[int], window: int | None) -> Callable[[int], int]:
    """A function: the work of all queries before a position, in pairs of query and key. What a token costs whatever it
    sees is left out: every rank has as many."""

    before = [0, *accumulate(causal_pairs(end - start, window) for start, end in pairwise(boundaries))]

    def work(position: int) -> int:
        number = bisect_right(boundaries, position) - 1
        return before[number] + causal_pairs(position - boundaries[number], window)

    return work


def _ranges(*ranges: tuple[int, int]) -> Part:
    """Without empty ones, and with neighbours as one."""
    found: Part = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return found


def document_rows(boundaries: Sequence[int], batch: int, sequence_length: int) -> list[list[int]]:
    """The document boundaries of each sequence of a batch, from 0 to S."""
    rows: list[list[int]] = []
    for row in range(batch):
        first = row * sequence_length
        inside = boundaries[bisect_left(boundaries, first) : bisect_right(boundaries, first + sequence_length)]
        rows.append([bound - first for bound in inside])
        assert rows[-1][0] == 0 and rows[-1][-1] == sequence_length, "documents must not cross rows of the batch"
    return rows


def shard_sequence(array: NDArray, context_parallel_size: int, cp_rank: int) -> NDArray:
    """This rank's part of an array [B, S, ...] -> [B, S / P, ...]; a view where P is 1."""
    sequence_length = array.shape[1]
    check_sequence_length(sequence_length, context_parallel_size)
    starts = chunk_starts(sequence_length, context_parallel_size, cp_rank)
    if len(starts) == 1:
        return array
    chunk = sequence_length // (2 * context_parallel_size)
    return np.concatenate([array[:, start : start + chunk] for start in starts], axis=1)
