"""Micro-batches made ready while a step runs."""

from __future__ import annotations

import threading

import pytest

from launch.data.batches import Batches, MicroBatch, SequenceSampler
from launch.data.prefetch import Prefetcher
from tests.unit.made_corpora import corpus_of


def test_prefetcher_gives_what_load_gives_one_step_ahead() -> None:
    batches = Batches(SequenceSampler(corpus_of(1000), 10, seed=0), 4, 4, 1, 0)
    calls: list[int] = []

    def load(step: int) -> list[MicroBatch]:
        calls.append(step)
        return batches.micro_batches(step)

    with Prefetcher(load, stop=6) as prefetcher:
        for step in (0, 1, 2, 4, 5):
            [got] = prefetcher.get(step)
            assert (got.input_ids == batches.micro_batches(step)[0].input_ids).all()
    assert calls in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5])  # 3 was ahead when 4 was asked for
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetcher_loads_while_the_step_runs_and_no_further_ahead() -> None:
    loaded = [threading.Event() for _ in range(4)]

    def load(step: int) -> int:
        loaded[step].set()
        return step

    with Prefetcher(load) as prefetcher:
        assert prefetcher.get(0) == 0
        assert loaded[1].wait(600)
        assert not loaded[2].wait(0.1)


def test_prefetcher_raises_in_the_step_that_failed_and_closes() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise OSError("the disk went away")
        return step

    prefetcher = Prefetcher(load)
    assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        prefetcher.get(2)
    assert prefetcher.get(3) == 3
    prefetcher.close()
    prefetcher.close()
