"""Ring attention against attention over the whole sequence on one rank: the output and all three gradients.

The sharder, the plan, the ring and a kernel are tested together, for every P in one world of eight.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.ring
from model.kernels import KERNELS
from parallel.ring import RingAttention
from parallel.ring_plan import ring_plan
from tests.distributed.context_cases import (
    CASES,
    LONG,
    NAMES,
    PRIMES,
    RINGS,
    SCALE,
    Case,
    Results,
    S,
    dense,
    full_inputs,
    local_part,
    on_rings,
    relative_errors,
    results_of,
    worst,
)
from tests.distributed.harness import run_distributed


def make_ring(group: dist.ProcessGroup, case: Case, kernel: str) -> RingAttention:
    return RingAttention(group, KERNELS[kernel], scale=SCALE, window=case.window)


def errors(group: dist.ProcessGroup, case: Case, kernel: str, dtype: torch.dtype) -> dict[str, float]:
    results = results_of(make_ring(group, case, kernel), group, full_inputs(case), case, dtype)
    assert all(result.dtype == dtype for result in results)
    return relative_errors(results, case, partial(local_part, group=group))


# -- against the dense twin --------------------------------------------------------------------------------------------


def _all_errors() -> Results:
    def measure(size: int, group: dist.ProcessGroup) -> Results:
        found = {}
        for name, case in CASES.items():
            found[size, name, "math", "fp64"] = errors(group, case, "math", torch.float64)
            found[size, name, "cpu", "fp32"] = errors(group, case, "cpu", torch.float32)
        return found

    return on_rings(measure)


@pytest.fixture(scope="module")
def all_errors() -> Results:
    return worst(run_distributed(_all_errors, 8))


@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), [("math", "fp64", 1e-12), ("cpu", "fp32", 1e-5)])
def test_equals_attention_over_the_whole_sequence(
    all_errors: Results, size: int, kernel: str, dtype: str, tolerance: float
) -> None:
    for name in CASES:
        for tensor, error in all_errors[size, name, kernel, dtype].items():
            assert error < tolerance, f"{name}: {tensor}"


# -- one ring over many batches ----------------------------------------------------------------------------------------


def _batches_and_repeats() -> bool:
    group = dist.new_group(RINGS[4])
    if dist.get_rank() not in RINGS[4]:
        return True
    # One ring serves all layers and batches: its plan must follow the documents and the length.
    packed, other = Case(lengths=PRIMES + LONG), Case(lengths=LONG + PRIMES)
    ring = make_ring(group, Case(), "math")
    for case, sequence in ((packed, S), (Case(), S), (other, S), (packed, S), (Case(), S // 2), (Case(), S)):
        results = results_of(ring, group, full_inputs(case, sequence), case, torch.float64)
        for result, full in zip(results, dense(case, sequence), strict=True):
            torch.testing.assert_close(result, local_part(full, group), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        deterministic = RingAttention(group, KERNELS["cpu"], scale=SCALE, deterministic=True)
        first, second = (results_of(deterministic, group, full_inputs(packed), packed, dtype) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True)), "the same bits again"
    return True


def test_one_ring_serves_many_batches_and_repeats_itself() -> None:
    assert all(run_distributed(_batches_and_repeats, 8))


# -- half precision ----------------------------------------------------------------------------------------------------


def _bf16_squares() -> Results:
    """Squared norms of this rank's errors and of its part of the reference."""
    sequence, case = 240, Case()

    def measure(size: int, group: dist.ProcessGroup) -> Results:
        found: Results = {}
        for kernel in ("cpu", "math"):
            attend, inputs = make_ring(group, case, kernel), full_inputs(case, sequence)
            results = results_of(attend, group, inputs, case, torch.bfloat16)
            squares = {}
            for name, result, full in zip(NAMES, results, dense(case, sequence), strict=True):
                part = local_part(full, group)
                squares[f"{name} error"] = (result.double() - part).square().sum().item()
                squares[name] = part.square().sum().item()
            found[size, kernel] = squares
        return found

    return on_rings(measure)


def test_the_error_of_bf16_does_not_grow_with_the_ring() -> None:
    results = run_distributed(_bf16_squares, 8)
    for kernel in ("cpu", "math"):
        relative: dict[int, dict[str, float]] = {}
        for size in RINGS:
            parts = [found[size, kernel] for found in results if (size, kernel) in found]
            assert len(parts) == size
            total = {key: sum(part[key] for part in parts) for key in parts[0]}
            relative[size] = {name: math.sqrt(total[f"{name} error"] / total[name]) for name in NAMES}
        # A real kernel loses most inside, whatever P. The reference rounds only what it hands out: once where P is 1,
        # and each partial result where it is more, so it is judged from P = 2 on.
        least = 1 if kernel == "cpu" else 2
        for name in NAMES:
            assert 1e-4 < relative[1][name] < 1e-2, "bf16 rounds, and no worse than it must"
            for size in RINGS:
                assert size < least or relative[size][name] <= 1.3 * relative[least][name], (kernel, size, name)


# -- planted faults ----------------------------------------------------------------------------------------------------


@contextmanager
def lost_messages(lost: Container[int]) -> Iterator[None]:
    """In place of messages of these numbers, a rank receives what it sends."""
    original, count = parallel.ring._pass_on, itertools.count()

    def pass_on(outgoing: Tensor, incoming: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
        if next(count) not in lost:
            return original(outgoing, incoming, group)
        incoming.copy_(outgoing)
        return []

    with mock.patch("parallel.ring._pass_on", pass_on):
        yield


def stale_keys(size: int) -> AbstractContextManager[None]:
    """The first message never arrives: step 1 computes with this rank's own keys again."""
    return lost_messages([0])


def gradients_not_sent_home(size: int) -> AbstractContextManager[None]:
    """The last hop of dK and dV is missing (P - 1 messages go out in forward, P - 1 and P in backward)."""
    return lost_messages(range(3 * size - 3, sys.maxsize))


@contextmanager
def wrong_direction(size: int) -> Iterator[None]:
    """Keys come from the next rank where the plan expects the previous one's."""
    original = dist.get_global_rank

    def get_global_rank(group: dist.ProcessGroup, rank: int) -> int:
        return original(group, (2 * dist.get_rank(group) - rank) % size)

    with mock.patch("torch.distributed.get_global_rank", get_global_rank):
        yield


@contextmanager
def skipped_step(size: int) -> Iterator[None]:
    original = parallel.ring._bind

    def bind(*arguments: Any) -> list[list[Any]]:
        return original(*arguments)[:-1] + [[]]

    with mock.patch("parallel.ring._bind", bind):
        yield


def _window_changed_by(change: int) -> Callable[[int], Any]:
    @contextmanager
    def fault(size: int) -> Iterator[None]:
        original = ring_plan

        def plan(length: int, size: int, rank: int, window: int | None = None, *rest: Any) -> Any:
            return original(length, size, rank, None if window is None else window + change, *rest)

        with mock.patch("parallel.ring.ring_plan", plan):
            yield

    return fault


@contextmanager
def lse_of_the_wrong_half(size: int) -> Iterator[None]:
    """The merge weighs each of this rank's two chunks with the other's log-sum-exp."""
    original = parallel.ring._merge

    def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        original(out, lse, part, part_lse.roll(part_lse.shape[-1] // 2, dims=-1))

    with mock.patch("parallel.ring._merge", merge):
        yield


@contextmanager
def unweighted_merge(size: int) -> Iterator[None]:
    """The last partial result replaces what was there, without weights."""

    def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        out.copy_(part)
        lse.copy_(part_lse)

    with mock.patch("parallel.ring._merge", merge):
        yield


@contextmanager
def documents_of_the_first_row(size: int) -> Iterator[None]:
    original = parallel.ring.document_rows

    def by_row(*arguments: Any) -> list[list[int]]:
        rows = original(*arguments)
        return [rows[0]] * len(rows)

    with mock.patch("parallel.ring.document_rows", by_row):
        yield


FAULTS: dict[str, tuple[Callable[[int], Any], str, tuple[str, ...]]] = {
    "stale keys": (stale_keys, "causal", NAMES),
    "skipped step": (skipped_step, "causal", NAMES),
    "wrong direction": (wrong_direction, "causal", NAMES),
    "LSE of the wrong half": (lse_of_the_wrong_half, "causal", NAMES),
    "unweighted merge": (unweighted_merge, "causal", NAMES),
    "window one too wide": (_window_changed_by(+1), "window larger than a chunk", NAMES),
    "window one too narrow": (_window_changed_by(-1), "window smaller than a chunk", NAMES),
    "window one too narrow, one pair": (_window_changed_by(-1), "window that hides one pair", NAMES),
    "window one too wide, documents": (_window_changed_by(+1), "documents and window", NAMES),
    "dK and dV not sent home": (gradients_not_sent_home, "causal", ("dk", "dv")),
    "documents of the first row": (documents_of_the_first_row, "documents", NAMES),
}
"""Name: (fault, the case that must notice, the tensors that must be wrong)."""


def _errors_under_faults() -> Results:
    def measure(size: int, group: dist.ProcessGroup) -> Results:
        found = {}
        for name, (fault, case, _) in FAULTS.items() if size in (3, 4) else ():
            with fault(size):
                found[size, name] = errors(group, CASES[case], "math", torch.float64)
        return found

    return on_rings(measure)


@pytest.fixture(scope="module")
def errors_under_faults() -> Results:
    return worst(run_distributed(_errors_under_faults, 8))


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(errors_under_faults: Results, fault: str, size: int) -> None:
    """Were one to slip through, the comparison above would prove nothing."""
    for name in FAULTS[fault][2]:
        error = errors_under_faults[size, fault][name]
        assert error > 1e-4 or math.isnan(error), f"{name} is off by {error} only"
