"""Attention by heads against attention over the whole sequence on one rank: alone, and around an exchange or a ring.

P context_parallel_size = U ranks that trade heads x R that trade keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.ulysses
from model.kernels import KERNELS, AttentionOperator, KernelOperator
from parallel.exchange import ExchangeAttention
from parallel.fused import Heads
from parallel.ring import RingAttention
from parallel.transport import MessageTransport
from parallel.ulysses import UlyssesAttention, group_sizes
from tests.distributed.context_cases import (
    CASES,
    NAMES,
    SCALE,
    Case,
    Results,
    full_inputs,
    local_part,
    relative_errors,
    results_of,
    worst,
)
from tests.distributed.harness import run_distributed

LAYOUTS = {
    (2, 1): [3, 6],
    (4, 1): [1, 2, 5, 7],
    (2, 2): [0, 2, 5, 6],
    (2, 4): list(range(8)),
    (4, 2): list(range(8)),
}
"""(U, R): the ranks of P, in the order of their parts. Consecutive U of them trade heads."""
INNER = ("exchange", "ring")


def groups(ranks: list[int], heads: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's context-parallel group, the part of it that trades heads, and the one that trades keys."""
    whole = dist.new_group(ranks)
    by_heads = [dist.new_group(ranks[i : i + heads]) for i in range(0, len(ranks), heads)]
    by_keys = [dist.new_group(ranks[i::heads]) for i in range(heads)]
    place = ranks.index(dist.get_rank()) if dist.get_rank() in ranks else 0
    return whole, by_heads[place // heads], by_keys[place % heads]


def make(
    by_heads: dist.ProcessGroup, by_keys: dist.ProcessGroup, case: Case, kernel: str, inner: str, **variant: Any
) -> UlyssesAttention:
    arguments: dict[str, Any] = {"scale": SCALE, "window": case.window}
    attend: AttentionOperator
    if by_keys.size() == 1:
        attend = KernelOperator(KERNELS[kernel], **arguments)
    elif inner == "ring":
        attend = RingAttention(by_keys, KERNELS[kernel], **arguments)
    else:
        attend = ExchangeAttention(MessageTransport(by_keys), KERNELS[kernel], keep_gathered=False, **arguments)
    return UlyssesAttention(MessageTransport(by_heads), attend, **variant)


def with_heads(case: Case, heads: int) -> Case:
    """The case with heads that `heads` ranks and up to four groups can share."""
    return dataclasses.replace(case, heads=8 * heads, kv_heads=4 * heads)


def errors(whole: dist.ProcessGroup, attend: UlyssesAttention, case: Case, dtype: torch.dtype) -> dict[str, float]:
    results = results_of(attend, whole, full_inputs(case), case, dtype)
    assert all(result.is_contiguous() and result.dtype == dtype for result in results)
    return relative_errors(results, case, partial(local_part, group=whole))


VARIANTS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("math", torch.float64, {}),
    ("math", torch.float64, {"head_groups": 3}),
    ("cpu", torch.float32, {"head_groups": 2}),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def _errors() -> Results:
    """Of each case in each layout around each inner operator, with one of the variants, in turn: every case meets all
    of them, and so does every layout around every inner operator."""
    found: Results = {}
    for number, ((heads, keys), ranks) in enumerate(LAYOUTS.items()):
        whole, by_heads, by_keys = groups(ranks, heads)
        if dist.get_rank() not in ranks:
            continue
        inners = INNER if keys > 1 else INNER[:1]
        for (which, (name, case)), (other, inner) in itertools.product(enumerate(CASES.items()), enumerate(inners)):
            case = with_heads(case, heads)
            turn = (which + number + other) % len(VARIANTS)
            kernel, dtype, variant = VARIANTS[turn]
            attend = make(by_heads, by_keys, case, kernel, inner, **variant)
            found[heads, keys, name, inner, turn] = errors(whole, attend, case, dtype)
    return found


@pytest.fixture(scope="module")
def all_errors() -> Results:
    return worst(run_distributed(_errors, 8))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]} by heads x {layout[1]} by keys")
def test_equals_attention_over_the_whole_sequence(all_errors: Results, layout: tuple[int, int]) -> None:
    found = {key: value for key, value in all_errors.items() if key[:2] == layout}
    assert {name for _, _, name, _, _ in found} == set(CASES)
    assert {(inner, turn) for *_, inner, turn in found} == set(
        itertools.product(INNER if layout[1] > 1 else INNER[:1], range(len(VARIANTS)))
    )
    for key, tensors in found.items():
        for tensor, error in tensors.items():
            assert error < TOLERANCE[VARIANTS[key[-1]][1]], (key, tensor)


def test_every_case_meets_every_variant(all_errors: Results) -> None:
    met = {(name, turn) for _, _, name, _, turn in all_errors}
    assert met == set(itertools.product(CASES, range(len(VARIANTS))))


@contextmanager
def neighbours_chunks() -> Iterator[None]:
    """Tokens in the order of ranks, as if the sequence were cut in contiguous parts."""

    def chunks(self: UlyssesAttention, rank: int, length: int) -> list[slice]:
        return [slice(rank * length, (rank + 1) * length)]

    with mock.patch.object(UlyssesAttention, "chunks", chunks):
        yield


@contextmanager
def heads_of_the_first_group() -> Iterator[None]:
    def heads(tensor: Tensor, first: int, count: int) -> Heads:
        return Heads(tensor, 0, count)

    with mock.patch.object(parallel.ulysses, "Heads", heads):
        yield


@contextmanager
def nothing_sent_back() -> Iterator[None]:
    original = parallel.ulysses._Trade.send

    def send(self: Any, slot: Tensor, group: int) -> Any:
        slot.zero_()
        return original(self, slot, group)

    with mock.patch.object(parallel.ulysses._Trade, "send", send):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "contiguous parts": neighbours_chunks,
    "heads of the first group": heads_of_the_first_group,
    "nothing sent back": nothing_sent_back,
}


def _errors_under_faults() -> Results:
    ranks = LAYOUTS[2, 2]
    whole, by_heads, by_keys = groups(ranks, 2)
    found: Results = {}
    for name, fault in FAULTS.items() if dist.get_rank() in ranks else ():
        with fault():
            case = with_heads(CASES["causal"], 2)
            attend = make(by_heads, by_keys, case, "math", "exchange", head_groups=2)
            found[name,] = errors(whole, attend, case, torch.float64)
    return found


@pytest.fixture(scope="module")
def errors_under_faults() -> Results:
    return worst(run_distributed(_errors_under_faults, 8))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(errors_under_faults: Results, fault: str) -> None:
    for name in NAMES:
        error = errors_under_faults[fault,][name]
        assert error > 1e-4 or math.isnan(error), f"{name} is off by {error} only"


@pytest.mark.parametrize(
    ("heads", "groups", "sizes"),
    [(4, 1, [4]), (5, 2, [2, 3]), (3, 3, [1, 1, 1]), (4, 3, [1, 2, 1]), (8, 3, [2, 4, 2]), (8, 4, [1, 3, 3, 1])],
)
def test_the_outer_groups_of_heads_are_the_smallest(heads: int, groups: int, sizes: list[int]) -> None:
    assert group_sizes(heads, groups) == sizes
