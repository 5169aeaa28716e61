"""The exchange plan, and the way home of gradients, by brute force: every allowed (query, key) pair once, no other, and
no key that nobody sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.exchange_plan import ExchangePlan, exchange_plan, one_call_is_faster
from parallel.key_gradients import KeyGradients
from parallel.key_layout import buffer_room
from parallel.sequence import Part, balanced_parts, causal_parts, zigzag_parts
from parallel.transport import Place, Rows


class Problem(NamedTuple):
    """A sequence and how it is cut."""

    size: int
    length: int
    window: int | None
    boundaries: list[int] | None
    parts: list[Part]
    joined: bool


def positions_of(rank: int, problem: Problem) -> np.ndarray:
    """Positions of a rank's tokens in their local order."""
    return np.concatenate([np.arange(start, stop) for start, stop in problem.parts[rank]])


def plans_of(problem: Problem) -> list[ExchangePlan]:
    arguments = problem.window, problem.boundaries, problem.parts, problem.joined
    return [exchange_plan(problem.length, problem.size, rank, *arguments) for rank in range(problem.size)]


def dense_mask(length: int, window: int | None, boundaries: list[int] | None) -> np.ndarray:
    """[query, key] by definition."""
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    visible = key <= query
    if window is not None:
        visible &= query - key < window
    if boundaries is not None:
        document = np.searchsorted(boundaries, np.arange(length), side="right")
        visible &= document[:, None] == document[None]
    return visible


def filled_buffers(plans: list[ExchangePlan], problem: Problem) -> list[np.ndarray]:
    """Positions that each rank's buffer holds after the exchange; -1 where nothing was written."""
    buffers = [np.full(plan.buffer_length, -1) for plan in plans]
    for rank, plan in enumerate(plans):
        mine = positions_of(rank, problem)
        for local, index, count in (*plan.own, *([plan.own_again] if plan.own_again else [])):
            assert (buffers[rank][index : index + count] == -1).all(), "a place is filled twice"
            buffers[rank][index : index + count] = mine[local : local + count]
    for rank, plan in enumerate(plans):
        for peer, pieces in plan.receives.items():
            assert pieces == plans[peer].sends[rank], "receiver and sender must plan the same pieces in the same order"
            for piece in pieces:
                sent = buffers[peer][piece.owner_index : piece.owner_index + piece.length]
                assert (positions_of(peer, problem)[piece.local] == sent).all()
                into = slice(piece.receiver_index, piece.receiver_index + piece.length)
                assert (buffers[rank][into] == -1).all(), "a place is filled twice"
                buffers[rank][into] = sent
    for buffer, plan in zip(buffers, plans, strict=True):
        if plan.copied is not None:
            first, second = plan.copied
            assert first.stop > first.start and (buffer[second] == -1).all(), "a place is filled twice"
            buffer[second] = buffer[first]
    return buffers


def covered(plan: ExchangePlan, buffer: np.ndarray, mine: np.ndarray, length: int, window: int | None) -> np.ndarray:
    """[query, place in the buffer] pairs that the calls compute, counted."""
    count = np.zeros((length, len(buffer)), dtype=int)
    for call in plan.calls:
        queries, keys = mine[call.q_start : call.q_stop], range(call.k_start, call.k_stop)
        query_bounds = call.query_bounds or (0, len(queries))
        key_bounds = call.key_bounds or (0, len(keys))
        assert query_bounds[-1] == len(queries) and key_bounds[-1] == len(keys)
        assert len(query_bounds) == len(key_bounds)
        for q0, q1, k0, k1 in zip(query_bounds, query_bounds[1:], key_bounds, key_bounds[1:], strict=False):
            assert k1 - k0 >= q1 - q0 > 0
            for i, query in enumerate(queries[q0:q1]):
                for j in range(k1 - k0):
                    distance = i + (k1 - k0) - (q1 - q0) - j  # aligned at the ends
                    if distance >= 0 and (window is None or distance < window):
                        count[query, call.k_start + k0 + j] += 1
    return count


@st.composite
def any_parts(draw: st.DrawFn, length: int, size: int) -> list[Part]:
    """Each rank takes a piece from either end of what is left, or from one."""
    low, high, each, parts = 0, length, length // size, []
    for _ in range(size - 1):
        left = draw(st.integers(0, each))
        pieces = (low, low + left), (high - each + left, high)
        parts.append([(start, stop) for start, stop in pieces if start < stop])
        low, high = low + left, high - each + left
    return [*parts, [(low, high)]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    size = draw(st.integers(1, 5))
    length = 2 * size * draw(st.integers(1, 6))
    window = draw(st.none() | st.integers(1, length + 2))
    inner = draw(st.none() | st.sets(st.integers(1, length - 1)))
    boundaries = None if inner is None else [0, *sorted(inner), length]
    cuts = [st.just(zigzag_parts(length, size)), any_parts(length, size)]
    if boundaries is not None:
        cuts.append(st.just(balanced_parts(length, size, boundaries, window)))
    return Problem(size, length, window, boundaries, draw(st.one_of(cuts)), joined=draw(st.booleans()))


@settings(max_examples=250)
@given(problems())
def test_each_allowed_pair_is_computed_once(problem: Problem) -> None:
    length, window = problem.length, problem.window
    plans = plans_of(problem)
    buffers = filled_buffers(plans, problem)
    total = np.zeros((length, length), dtype=int)
    for rank, (plan, buffer) in enumerate(zip(plans, buffers, strict=True)):
        assert (buffer >= 0).all(), "a place of the buffer stays empty"
        if plan.twice is not None:
            first, second = plan.twice
            assert first.start < first.stop and (buffer[first] == buffer[second]).all()
        mine = positions_of(rank, problem)
        for call in plan.calls:
            assert call.remote == (not np.isin(buffer[call.k_start : call.k_stop], mine).all())
        keys = [(call.k_stop - call.k_start) * call.remote for call in plan.calls]
        assert keys == sorted(keys, reverse=True), "what travels farthest comes first"
        count = covered(plan, buffer, mine, length, window)
        np.add.at(total, (slice(None), buffer), count)
    assert (total == dense_mask(length, window, problem.boundaries)).all()


class InMemory:
    """A transport between ranks that take turns in one process."""

    def __init__(self, rank: int, size: int, offered: dict[tuple[int, int], list[tuple[slice, Tensor]]]):
        self.rank, self.size, self.offered = rank, size, offered

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_full(shape, math.nan)

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> InMemory:
        peers = [peer for peer in range(self.size) if peer != self.rank]
        for peer in peers:
            self.offered[self.rank, peer] = [(taken, slot[taken].clone()) for taken in rows(self.rank, peer)]

        def wait() -> None:
            for peer in peers:
                offered = self.offered[peer, self.rank]
                assert [taken for taken, _ in offered] == rows(peer, self.rank), "owner and reader agree on the rows"
                place(peer, [part for _, part in offered])

        self.wait = wait
        return self


@settings(max_examples=150)
@given(problems())
@example(Problem(3, 36, 8, None, [[(0, 2), (26, 36)], [(2, 12), (13, 15)], [(12, 13), (15, 26)]], joined=False))
def test_every_key_hears_once_of_each_query_that_saw_it(problem: Problem) -> None:
    """The gradient of a key's element q counts how often query q saw the key; of a value it is twice that."""
    plans, offered = plans_of(problem), {}
    gradients = []
    for rank, plan in enumerate(plans):
        buffer, mine = torch.empty(plan.buffer_length, 2, 1, 1, problem.length), positions_of(rank, problem)
        transport: Any = InMemory(rank, problem.size, offered)
        gradients.append(KeyGradients(transport, plan, buffer))
        for call, *rest in (plan.calls[number:] for number in range(len(plan.calls))):
            one = replace(plan, calls=(call,))
            counts = torch.from_numpy(covered(one, np.empty(len(buffer)), mine, problem.length, problem.window)).T
            keys = slice(call.k_start, call.k_stop)
            with gradients[rank].of(keys if call.k_stop - call.k_start < len(buffer) else None) as (dk, dv):
                dk[0, :, 0], dv[0, :, 0] = counts[keys], 2 * counts[keys]
            if call is plan.calls[0] and not any(later.remote for later in rest):
                gradients[rank].send_home()
        gradients[rank].send_home()
    mask = torch.from_numpy(dense_mask(problem.length, problem.window, problem.boundaries)).float()
    for rank, of_keys in enumerate(gradients):
        mine = positions_of(rank, problem)
        dk, dv = torch.empty(2, 1, len(mine), 1, problem.length)
        of_keys.collect(dk, dv)
        assert torch.equal(dk[0, :, 0], mask.T[mine]) and torch.equal(dv[0, :, 0], 2 * mask.T[mine])


@settings(max_examples=250)
@given(problems())
@example(Problem(3, 12, None, None, [[(0, 4)], [(4, 7), (11, 12)], [(7, 11)]], joined=True))  # seven keys: too many
def test_joined_calls_are_one_and_buffers_fit(problem: Problem) -> None:
    plans = plans_of(problem)
    largest = max(plan.buffer_length for plan in plans)
    share = problem.length // problem.size
    room = buffer_room(problem.length, problem.size, problem.window, problem.joined)
    assert largest <= room <= problem.length + problem.joined * share
    assert problem.window is None or room <= share + 2 * (problem.window - 1)
    for plan in plans:
        assert plan.largest_buffer == largest
        if not problem.joined:
            assert plan.twice is None
            if problem.boundaries is None:  # such calls go to kernels that know no variable lengths, too
                assert all(call.query_bounds is None and call.key_bounds is None for call in plan.calls)
        elif problem.parts == zigzag_parts(problem.length, problem.size):
            assert len(plan.calls) == 1


@settings(max_examples=250)
@given(problems())
def test_only_what_is_seen_travels(problem: Problem) -> None:
    visible = dense_mask(problem.length, problem.window, problem.boundaries)
    for rank, plan in enumerate(plans_of(problem)):
        mine = positions_of(rank, problem)
        needed = set(np.flatnonzero(visible[mine].any(axis=0))) - set(mine)
        assert plan.received_tokens == len(needed)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_work_is_balanced(size: int) -> None:
    length = 16 * size
    work = []
    for rank in range(size):
        calls = exchange_plan(length, size, rank).calls
        queries = [(call.q_stop - call.q_start, call.k_stop - call.k_start) for call in calls]
        work.append(sum(q * k - q * (q - 1) // 2 for q, k in queries))
    assert len(set(work)) == 1


def test_bytes_follow_the_documents_and_the_window() -> None:
    length, size = 4096, 4
    whole = sum(exchange_plan(length, size, rank).received_tokens for rank in range(size))
    windowed = sum(exchange_plan(length, size, rank, window=64).received_tokens for rank in range(size))
    packed = sum(
        exchange_plan(length, size, rank, boundaries=[*range(0, length, 128), length]).received_tokens
        for rank in range(size)
    )
    assert whole == sum((2 * size - rank) * 512 - 1024 for rank in range(size))
    assert windowed == 6 * 63  # seven borders between chunks, one of them inside the last rank
    assert packed == 0  # documents end where chunks end


def test_the_last_rank_makes_one_call() -> None:
    plans = [exchange_plan(64, 4, rank) for rank in range(4)]
    assert [len(plan.calls) for plan in plans] == [2, 2, 2, 1]
    assert max(plan.buffer_length for plan in plans) == buffer_room(64, 4, None, joined=False)


def test_one_call_for_both_chunks() -> None:
    calls = [exchange_plan(64, 4, rank, joined=True).calls for rank in range(4)]
    assert [(call.query_bounds, call.key_bounds) for (call,) in calls] == [
        ((0, 8, 16), (0, 8, 72)),
        ((0, 8, 16), (0, 16, 72)),
        ((0, 8, 16), (0, 24, 72)),
        (None, None),
    ]
    documents = [0, 10, 60, 64]  # rank 0 of 2 holds [0, 16) and [48, 64): both see [10, 16)
    plan = exchange_plan(64, 2, 0, boundaries=documents, joined=True)
    assert [(call.query_bounds, call.key_bounds) for call in plan.calls] == [((0, 10, 16, 28, 32), (0, 10, 16, 66, 70))]
    assert plan.twice == (slice(10, 16), slice(16, 22)) and plan.own_again == (10, 16, 6) and plan.copied is None
    assert exchange_plan(64, 4, 1, joined=True).copied == (slice(0, 8), slice(16, 24))


def test_short_calls_are_joined() -> None:
    """At the shapes that were measured: query heads, tokens of a rank."""
    for heads, tokens in ((32, 2048), (32, 4096)):
        assert one_call_is_faster(heads, tokens)
        parts = causal_parts(2 * tokens, 2, heads)
        plans = [exchange_plan(2 * tokens, 2, rank, parts=parts, joined=True) for rank in (0, 1)]
        assert parts != zigzag_parts(2 * tokens, 2) and [len(plan.calls) for plan in plans] == [1, 1]
    assert not any(one_call_is_faster(heads, tokens) for heads, tokens in ((32, 8192), (32, 16384), (8, 16384)))
    assert one_call_is_faster(16, 8192) and not one_call_is_faster(1, 8194)  # "longer ones however few the heads"


def test_chunks_whose_documents_keep_their_keys_apart_share_a_call() -> None:
    documents = [0, 5, 20, 30, 50, 64]  # rank 0 of 2 holds [0, 16) and [48, 64): nothing that both see
    assert [len(exchange_plan(64, 2, rank, boundaries=documents).calls) for rank in (0, 1)] == [1, 1]
    (call,) = exchange_plan(64, 2, 0, boundaries=documents).calls
    assert call.query_bounds == (0, 5, 16, 18, 32) and call.key_bounds == (0, 5, 16, 36, 50)
    assert len(exchange_plan(64, 2, 0, boundaries=[0, 10, 64]).calls) == 2
