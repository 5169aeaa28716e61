"""How a sequence is cut over context-parallel ranks: zigzag.

Shapes: B batch, S sequence, P context_parallel_size.

The sequence is cut into 2P equal chunks and rank r holds chunks r and 2P-1-r, so that under a causal mask every rank
has the same number of (query, key) pairs to compute at every step of the ring (Striped Attention's balance,
arXiv:2311.09431, kept with contiguous chunks). Labels are shifted before the cut, so that no rank needs its neighbour's
token. Sequence parallelism cuts a rank's tokens again, in their local order, over its tensor-parallel peers
(`parallel.tensor.Region`).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


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


def chunk_starts(sequence_length: int, context_parallel_size: int, cp_rank: int) -> list[int]:
    """First positions of the chunks that `cp_rank` holds, in their local order; one chunk of S where P is 1."""
    if context_parallel_size == 1:
        return [0]
    chunk = sequence_length // (2 * context_parallel_size)
    return [chunk * cp_rank, chunk * (2 * context_parallel_size - 1 - cp_rank)]


def shard_sequence(array: NDArray, context_parallel_size: int, cp_rank: int) -> NDArray:
    """This rank's part of an array [B, S, ...] -> [B, S / P, ...]; a view where P is 1."""
    sequence_length = array.shape[1]
    check_sequence_length(sequence_length, context_parallel_size)
    starts = chunk_starts(sequence_length, context_parallel_size, cp_rank)
    if len(starts) == 1:
        return array
    chunk = sequence_length // (2 * context_parallel_size)
    return np.concatenate([array[:, start : start + chunk] for start in starts], axis=1)


def local_index(position: int, sequence_length: int, context_parallel_size: int) -> tuple[int, int]:
    """Where one position of the full sequence lives: (cp_rank, index in that rank's part)."""
    if context_parallel_size == 1:
        return 0, position
    chunk = sequence_length // (2 * context_parallel_size)
    number, offset = divmod(position, chunk)
    if number < context_parallel_size:
        return number, offset
    return 2 * context_parallel_size - 1 - number, chunk + offset
