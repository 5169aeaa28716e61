"""Learning rates against values worked out by hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from launch.schedule import learning_rate_at
from launch.sections.optimizer import OptimizerSection


def rate(step: int, *, total_steps: int, **keys: Any) -> float:
    optimizer = OptimizerSection(learning_rate=2.0, min_learning_rate_ratio=0.1, decay_fraction=0.2, **keys)
    return learning_rate_at(step, optimizer, total_steps)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_from_peak_over_warmup_to_peak(schedule: str) -> None:
    values = [rate(step, warmup_steps=4, total_steps=100, schedule=schedule) for step in range(5)]
    assert values == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_by_hand() -> None:
    cosine = partial(rate, warmup_steps=2, total_steps=11, schedule="cosine")
    assert cosine(2) == 2.0
    assert cosine(6) == pytest.approx(0.2 + 1.8 * 0.5)  # halfway between step 2 and step 10
    assert cosine(4) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert cosine(10) == pytest.approx(0.2)
    assert cosine(1000) == cosine(10)


def test_wsd_by_hand() -> None:
    wsd = partial(rate, warmup_steps=0, total_steps=20, schedule="wsd")  # decays over the last four steps
    assert [wsd(step) for step in range(16)] == [2.0] * 16
    assert [wsd(step) for step in range(16, 21)] == pytest.approx([1.55, 1.1, 0.65, 0.2, 0.2])


def test_wsd_decay_longer_than_the_rest_starts_after_the_warmup() -> None:
    wsd = partial(rate, warmup_steps=8, total_steps=10, schedule="wsd")
    assert [wsd(step) for step in (7, 8, 9)] == pytest.approx([2.0, 1.1, 0.2])


def test_constant_stays_and_no_warmup_starts_at_the_peak() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert rate(0, warmup_steps=0, total_steps=50, schedule=schedule) == 2.0
    assert rate(10**9, warmup_steps=0, total_steps=50, schedule="constant") == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 30])
def test_descends_without_a_jump_to_the_floor(schedule: str, warmup: int) -> None:
    total = 1000
    values = [rate(step, warmup_steps=warmup, total_steps=total, schedule=schedule) for step in range(total)]
    jumps = [after - before for before, after in zip(values[warmup:], values[warmup + 1 :], strict=False)]
    assert max(jumps) <= 0
    assert min(jumps) > -0.0101
    assert values[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (9, 5), (4, 5)])
def test_tiny_jobs_get_finite_rates(schedule: str, warmup: int, total: int) -> None:
    for step in range(total + 2):
        value = rate(step, warmup_steps=warmup, total_steps=total, schedule=schedule)
        assert 0 < value <= 2.0
