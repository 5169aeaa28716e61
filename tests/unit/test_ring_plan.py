"""The ring's plan, for every rank at once: each allowed (query, key) pair is computed exactly once, no other ever.

P context_parallel_size, S sequence_length, chunk = S / (2P), L = S / P.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numpy.typing import NDArray

from parallel.ring_plan import Call, ring_plan
from parallel.sequence import shard_sequence


def visible(call: Call) -> NDArray[np.bool_]:
    """The call's mask [queries, keys], as `model.kernels.AttentionMask` defines it."""
    queries, keys = np.arange(call.q_stop - call.q_start)[:, None], np.arange(call.k_stop - call.k_start)[None]
    seen = np.ones((queries.size, keys.size), dtype=bool)
    if call.causal:
        seen &= keys <= queries + call.offset
    if call.window is not None:
        seen &= queries + call.offset - keys < call.window
    if call.boundaries is not None:
        assert call.offset == 0 and queries.size == keys.size, "what a mask with documents asks for"
        assert call.boundaries[0] == 0 and call.boundaries[-1] == queries.size
        assert all(low < high for low, high in pairwise(call.boundaries))
        document = np.searchsorted(call.boundaries, np.arange(queries.size), side="right")
        seen &= document[:, None] == document[None]
    return seen


def allowed(length: int, window: int | None, boundaries: list[int] | None) -> NDArray[np.bool_]:
    pairs = np.zeros((length, length), dtype=bool)
    for start, stop in pairwise([0, length] if boundaries is None else boundaries):
        for query in range(start, stop):
            pairs[query, max(start, query + 1 - (window or length)) : query + 1] = True
    return pairs


def computed(length: int, size: int, window: int | None, boundaries: list[int] | None) -> NDArray[np.int64]:
    """How often each pair of the full sequence is computed, over all ranks and steps."""
    counts = np.zeros((length, length), dtype=np.int64)
    held = [shard_sequence(np.arange(length)[None], size, rank)[0] for rank in range(size)]
    for rank in range(size):
        plan = ring_plan(length, size, rank, window, boundaries)
        assert len(plan) == size, "one entry a step, even where there is nothing to do"
        for step, calls in enumerate(plan):
            for call in calls:
                queries = held[rank][call.q_start : call.q_stop]
                keys = held[(rank - step) % size][call.k_start : call.k_stop]
                assert 0 < len(queries) == call.q_stop - call.q_start and 0 < len(keys) == call.k_stop - call.k_start
                counts[np.ix_(queries, keys)] += visible(call)
    return counts


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, int, int | None, list[int] | None]:
    """(S, P, window, boundaries)."""
    size = draw(st.integers(1, 8))
    length = 2 * size * draw(st.integers(1, 7)) if size > 1 else draw(st.integers(1, 40))
    window = draw(st.none() | st.integers(1, length + 2))
    inner = draw(st.none() | st.sets(st.integers(1, length - 1), max_size=12)) if length > 1 else None
    return length, size, window, None if inner is None else [0, *sorted(inner), length]


@settings(max_examples=500)
@given(sequences())
@example((16, 8, 1, None))
@example((96, 8, None, list(range(97))))
@example((96, 4, 13, [0, *accumulate((1, 70, 1, 24))]))
def test_every_allowed_pair_once_and_no_other(sequence: tuple[int, int, int | None, list[int] | None]) -> None:
    length, size, window, boundaries = sequence
    np.testing.assert_array_equal(computed(length, size, window, boundaries), allowed(length, window, boundaries))


@settings(max_examples=300)
@given(sequences())
def test_rectangles_are_trimmed_to_what_is_visible(
    sequence: tuple[int, int, int | None, list[int] | None],
) -> None:
    length, size, window, boundaries = sequence
    for rank in range(size):
        for calls in ring_plan(length, size, rank, window, boundaries):
            for call in calls:
                seen = visible(call)
                assert seen.any(axis=0).all() and seen.any(axis=1).all(), "no empty query row, no unused key"
                if not call.causal:  # a window is kept only where it hides something
                    assert seen.all() == (call.window is None) and call.boundaries is None
                if call.window is None:
                    assert call.offset == 0
                if boundaries is None:
                    assert call.boundaries is None, "kernels that know no documents are asked too"


@pytest.mark.parametrize("size", range(2, 9))
def test_plain_causal_work_is_equal_on_all_ranks_at_each_step(size: int) -> None:
    length = 2 * size * 5
    local = length // size
    plans = [ring_plan(length, size, rank) for rank in range(size)]
    for step in range(size):
        work = [[visible(call).sum() for call in plan[step]] for plan in plans]
        assert {len(calls) for calls in work} == {1}, "one kernel call a step"
        expected = local * local // 2 if step else local * (local + 1) // 2
        assert {int(sum(calls)) for calls in work} == {expected}
        areas = {(c.q_stop - c.q_start) * (c.k_stop - c.k_start) for plan in plans for c in plan[step]}
        assert areas == {local * local // 2 if step else local * local}


def test_a_window_leaves_far_steps_empty() -> None:
    """Chunks two apart share nothing in a window of one chunk: those steps have nothing to compute."""
    length, size = 64, 4  # chunks of 8
    per_rank = [[len(calls) for calls in ring_plan(length, size, rank, window=8)] for rank in range(size)]
    # Diagonals at step 0, the chunk before at the step that brings the neighbour's keys.
    assert per_rank == [[2, 0, 0, 1], [2, 1, 0, 1], [2, 1, 0, 1], [3, 1, 0, 0]]


def test_documents_inside_a_chunk_need_no_other_rank() -> None:
    for rank in range(4):
        plan = ring_plan(64, 4, rank, boundaries=range(0, 65, 8))
        assert [len(calls) for calls in plan] == [2, 0, 0, 0]
