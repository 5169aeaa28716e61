"""Which kernel calls a rank makes at each step of a zigzag ring. Pure Python: no tensor, no process group.

P context_parallel_size, S sequence_length, chunk = S / (2P). Rank r holds chunks r and 2P-1-r (see
`parallel.sequence`), and at step s it holds the keys and values of rank (r - s) mod P. Positions in a Call index this
rank's queries and the held keys, [0, S / P) each.

Two distinct chunks share at most one document, because a document is contiguous: it would hold the end of the earlier
chunk and the start of the later one. So every block off the diagonal is one dense rectangle, trimmed to that document
and to the window; only the diagonal needs document boundaries. (Checked by brute force in the tests.)
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.sequence import chunk_starts


@dataclass(frozen=True)
class Call:
    """One kernel call: this rank's queries [q_start, q_stop) against the held keys [k_start, k_stop)."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False
    window: int | None = None
    offset: int = 0
    """Position of the first query minus position of the first key; read only with causal or window."""
    boundaries: tuple[int, ...] | None = None
    """Documents inside the block, from 0 to its length; only on the diagonal."""


def ring_plan(
    sequence_length: int,
    context_parallel_size: int,
    cp_rank: int,
    window: int | None = None,
    boundaries: Sequence[int] | None = None,
) -> list[list[Call]]:
    """The calls of each step, P lists in ring order; an empty list is a step with nothing to compute.

    `boundaries` are one row's document boundaries, 0 = b0 < b1 < ... < S, in positions of the full sequence.
    """
    size, local_length = context_parallel_size, sequence_length // context_parallel_size
    if window is None and boundaries is None:
        return _plain_causal(local_length, size, cp_rank)
    bounds = [0, sequence_length] if boundaries is None else list(boundaries)
    chunk = sequence_length // (2 * size) if size > 1 else sequence_length
    queries = chunk_starts(sequence_length, size, cp_rank)
    plan = []
    for step in range(size):
        keys = chunk_starts(sequence_length, size, (cp_rank - step) % size)
        calls = []
        for q_index, q_first in enumerate(queries):
            for k_index, k_first in enumerate(keys):
                if k_first <= q_first:
                    call = _block(q_first, k_first, chunk, window, bounds, boundaries is not None)
                    if call is not None:
                        calls.append(_shifted(call, q_index * chunk, k_index * chunk))
        plan.append(calls)
    return plan


def _plain_causal(local_length: int, size: int, cp_rank: int) -> list[list[Call]]:
    """No window, no documents: one causal call, then one full rectangle of equal area at every step."""
    half = local_length // 2
    plan = [[Call(0, local_length, 0, local_length, causal=True)]]
    for step in range(1, size):
        if (cp_rank - step) % size < cp_rank:  # keys from an earlier rank: all queries see their first chunk
            plan.append([Call(0, local_length, 0, half)])
        else:  # from a later rank: only the second chunk's queries see them, all of them
            plan.append([Call(half, local_length, 0, local_length)])
    return plan


def _block(q_first: int, k_first: int, chunk: int, window: int | None, bounds: list[int], packed: bool) -> Call | None:
    """The visible part of one chunk pair as a Call in chunk-local indices; None where nothing is visible."""
    if q_first == k_first:
        inside = None
        if packed:
            low, high = bisect.bisect_right(bounds, q_first), bisect.bisect_left(bounds, q_first + chunk)
            inside = (0, *(bound - q_first for bound in bounds[low:high]), chunk)
        return Call(0, chunk, 0, chunk, causal=True, window=window, boundaries=inside)
    # The one document that may hold the last key and the first query:
    after = bisect.bisect_right(bounds, k_first + chunk - 1)
    document_start, document_stop = bounds[after - 1], bounds[after]
    if document_stop <= q_first:
        return None
    q_stop, k_start = min(q_first + chunk, document_stop), max(k_first, document_start)
    k_stop = k_first + chunk
    if window is not None:
        k_start = max(k_start, q_first - window + 1)
        q_stop = min(q_stop, k_stop - 1 + window)
        if k_start >= k_stop:
            return None
        if q_stop - 1 - k_start < window:
            window = None  # every pair left is inside the window
    offset = q_first - k_start if window is not None else 0
    return Call(0, q_stop - q_first, k_start - k_first, k_stop - k_first, window=window, offset=offset)


def _shifted(call: Call, q_shift: int, k_shift: int) -> Call:
    return replace(
        call,
        q_start=call.q_start + q_shift,
        q_stop=call.q_stop + q_shift,
        k_start=call.k_start + k_shift,
        k_stop=call.k_stop + k_shift,
    )
