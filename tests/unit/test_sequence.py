"""The zigzag cut: complete, balanced, and told to the user where it does not work out."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest

from parallel.sequence import (
    balanced_parts,
    causal_parts,
    check_sequence_length,
    check_sequence_parallel,
    chunk_starts,
    document_rows,
    shard_sequence,
    zigzag_parts,
)

SIZES = (1, 2, 3, 4, 8)
SEQUENCE = 48


def positions(size: int, rank: int) -> list[int]:
    return shard_sequence(np.arange(SEQUENCE)[None], size, rank)[0].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_each_position_is_on_one_rank(size: int) -> None:
    parts = [positions(size, rank) for rank in range(size)]
    assert sorted(sum(parts, [])) == list(range(SEQUENCE))
    assert {len(part) for part in parts} == {SEQUENCE // size}
    for part in parts:  # causal masks of local indices rely on this
        assert part == sorted(part)


@pytest.mark.parametrize("size", SIZES)
def test_chunk_starts_say_where_the_parts_begin(size: int) -> None:
    for rank in range(size):
        part = positions(size, rank)
        breaks = [part[0], *(later for before, later in pairwise(part) if later != before + 1)]
        starts = chunk_starts(SEQUENCE, size, rank)
        # The last rank's two chunks touch.
        assert starts == (breaks if rank < size - 1 or size == 1 else [part[0], part[len(part) // 2]])


@pytest.mark.parametrize("size", SIZES)
def test_ranks_have_equal_numbers_of_causal_pairs(size: int) -> None:
    work = {sum(position + 1 for position in positions(size, rank)) for rank in range(size)}
    assert len(work) == 1


def test_batches_and_trailing_dims_stay_together() -> None:
    array = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    part = shard_sequence(array, 3, 1)
    assert part.shape == (2, 4, 3)
    np.testing.assert_array_equal(part, array[:, [2, 3, 8, 9]])
    assert np.shares_memory(shard_sequence(array, 1, 0), array), "one rank copies nothing"


def test_lengths_that_do_not_cut() -> None:
    for length, size in ((48, 4), (7, 1), (2, 1), (16, 8), (1, 1)):
        check_sequence_length(length, size)
    with pytest.raises(ValueError) as caught:
        check_sequence_length(100, 3)
    assert "sequence_length (100)" in str(caught.value) and "2 x 3 = 6" in str(caught.value)
    assert "nearest valid lengths: 96, 102" in str(caught.value)
    with pytest.raises(ValueError, match="nearest valid lengths: 16$"):
        check_sequence_length(8, 8)
    with pytest.raises(ValueError, match=r"sequence_length \(10\)"):
        shard_sequence(np.zeros((1, 10)), 2, 0)


def tokens_of(part: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(*piece) for piece in part])


def cost_of(parts: list[list[tuple[int, int]]], boundaries: list[int], window: int) -> float:
    """Of the busiest rank, one query after the other: pairs, 128 for each token, and 256 for each key of others."""
    work, fetched = [], []
    for part in parts:
        queries = tokens_of(part)
        first = np.array(boundaries)[np.searchsorted(boundaries, queries, side="right") - 1]
        first = np.maximum(first, queries - window + 1)
        seen = np.zeros(boundaries[-1] + 1, dtype=int)
        np.add.at(seen, first, 1)
        np.add.at(seen, queries + 1, -1)
        work.append((queries - first + 1 + 128).sum())
        fetched.append(len(np.setdiff1d(np.flatnonzero(seen.cumsum() > 0), queries)))
    return max(work) + 256 * max(fetched)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [None, 300])
def test_documents_balance(size: int, window: int | None) -> None:
    length = 1024 * size
    boundaries = [0, 37, 38, 380, 700, length // 2 + 99, length]
    parts = balanced_parts(length, size, boundaries, window)
    assert sorted(np.concatenate(list(map(tokens_of, parts))).tolist()) == list(range(length))
    assert {len(tokens_of(part)) for part in parts} == {length // size}
    assert all(1 <= len(part) <= 2 for part in parts)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("boundaries", [[0, 37, 38, 380, 700, 1123, 2048], [0, 37, 2048]])
def test_no_cut_in_two_costs_much_less(boundaries: list[int], window: int | None) -> None:
    """Whether there are ends of documents to cut at, or none where it helps."""
    every = [[[(0, left), (1024 + left, 2048)], [(left, 1024 + left)]] for left in range(0, 1025, 16)]
    costs = [cost_of(cut, boundaries, window or 2048) for cut in every]
    assert cost_of(balanced_parts(2048, 2, boundaries, window), boundaries, window or 2048) <= 1.01 * min(costs)
    if len(boundaries) > 3:
        assert cost_of(zigzag_parts(2048, 2), boundaries, window or 2048) > 1.1 * min(costs)


def test_long_documents_are_not_cut_where_short_ones_can_be() -> None:
    """Of three ranks: 12 tokens to a document up to the middle, 1,001 behind it."""
    length = 8192
    middle = 3 * length // 2
    boundaries = [*range(0, middle, 12), *range(middle, 3 * length, 1001), 3 * length]
    for part in balanced_parts(3 * length, 3, boundaries):
        for start, _ in part:
            assert start - max(bound for bound in boundaries if bound <= start) < 12


def test_lengths_whose_parts_do_not_cut_for_sequence_parallelism() -> None:
    """The lengths offered are the next ones that both checks let pass."""
    for ranks in ((1, 3), (1, 4), (2, 3), (4, 2)):
        bad = 3 * 4 * 24 + 1
        with pytest.raises(ValueError, match="sequence_parallel; nearest valid lengths: ") as caught:
            check_sequence_parallel(bad, *ranks)
        offered = [int(number) for number in re.findall(r"lengths: (\d+), (\d+);", str(caught.value))[0]]
        valid = [tokens for tokens in range(2, 2 * bad) if tokens % math.prod(ranks) == 0 and cuts(tokens, ranks[0])]
        assert offered == [max(one for one in valid if one < bad), min(one for one in valid if one > bad)]
        check_sequence_parallel(offered[0], *ranks)


def cuts(length: int, size: int) -> bool:
    return size == 1 or length % (2 * size) == 0


@pytest.mark.parametrize("size", SIZES)
def test_one_document_is_cut_in_zigzag(size: int) -> None:
    assert balanced_parts(480, size, [0, 480]) == zigzag_parts(480, size)


@pytest.mark.parametrize("heads", [1, 8, 32, 300])
@pytest.mark.parametrize("length", [1024, 1400, 2048])
def test_the_last_rank_makes_up_for_the_others_second_chunks(length: int, heads: int) -> None:
    """Against all cuts of two ranks by whole tiles; a second chunk costs 10,000 pairs a token and query head."""
    second = 10_000 * (length // 2) / heads
    lefts = [left for left in range(length) if (left - length // 2) % 128 == 0]
    every = [[[(0, left), (length + left, 2 * length)], [(left, length + left)]] for left in lefts]

    def cost(cut: list[list[tuple[int, int]]]) -> float:
        pairs = [(tokens_of(part) + 1 + 128).sum() for part in cut]
        return max(pairs[0] + second, pairs[1]) + 256 * cut[1][0][1]

    parts = causal_parts(2 * length, 2, heads)
    assert cost(parts) <= min(map(cost, every)) + 1
    assert parts in every or parts == [[(length, 2 * length)], [(0, length)]]


@pytest.mark.parametrize("heads", [8, 32])
def test_three_ranks_share_the_work_as_well_as_any_cut_by_tiles(heads: int) -> None:
    length = 1024

    def pieces(low: int, high: int, left: int) -> list[tuple[int, int]]:
        return [(low, low + left), (high - length + left, high)]

    def busiest(parts: list[list[tuple[int, int]]]) -> float:
        second = [10_000 * (length // 2) / heads * (len(part) == 2 and part[0][1] < part[1][0]) for part in parts]
        return max((tokens_of(part) + 1).sum() + more for part, more in zip(parts, second, strict=True))

    every = [
        [pieces(0, 3072, one), pieces(one, 2048 + one, two), [(one + two, 1024 + one + two)]]
        for one in range(0, length, 128)
        for two in range(0, length, 128)
    ]
    assert busiest(causal_parts(3 * length, 3, heads)) == min(map(busiest, every))


def test_measured_shapes_are_cut_by_a_tile_or_two() -> None:
    shifts = {
        (heads, length): causal_parts(2 * length, 2, heads)[1][0][0] - length // 2
        for heads, length in ((32, 4096), (32, 8192), (8, 16384), (32, 32768))
    }
    assert shifts == {(32, 4096): 128, (32, 8192): 128, (8, 16384): 256, (32, 32768): 0}
    assert causal_parts(2**20, 8, 32) == zigzag_parts(2**20, 8)


@pytest.mark.parametrize("size", SIZES)
def test_a_short_window_needs_one_chunk_a_rank(size: int) -> None:
    cut = causal_parts(1024 * size, size, 32, 100)
    assert cut == [[(rank * 1024, (rank + 1) * 1024)] for rank in range(size)]
    if size > 1:
        assert all(len(part) == 2 for part in causal_parts(1024 * size, size, 32, 1000)[:-1])


def test_each_row_has_documents_of_its_own() -> None:
    assert document_rows([0, 5, 24, 30, 48], 2, 24) == [[0, 5, 24], [0, 6, 24]]
    with pytest.raises(AssertionError, match="must not cross rows"):
        document_rows([0, 5, 30, 48], 2, 24)
