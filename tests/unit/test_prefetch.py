"""Micro-batches made ready while a step runs."""

from __future__ import annotations

import threading

import pytest

from launch.data.batches import Batches, MicroBatch, SequenceSampler
from launch.data.prefetch import prefetched
from tests.unit.made_corpora import corpus_of


def test_each_step_is_loaded_once_and_in_order() -> None:
    batches = Batches(SequenceSampler(corpus_of(1000), 10, seed=0), 4, 4, 1, 0)
    calls: list[int] = []

    def load(step: int) -> list[MicroBatch]:
        calls.append(step)
        return batches.micro_batches(step)

    with prefetched(load, range(2, 6)) as loaded:
        for step in range(2, 6):
            [got] = next(loaded)
            assert (got.input_ids == batches.micro_batches(step)[0].input_ids).all()
        assert next(loaded, None) is None
    assert calls == [2, 3, 4, 5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_loading_goes_on_while_the_step_runs_and_no_further_ahead() -> None:
    loading = [threading.Event() for _ in range(4)]

    def load(step: int) -> int:
        loading[step].set()
        return step

    with prefetched(load, range(4)) as loaded:
        assert not loading[0].is_set(), "nothing is loaded before it is asked for"
        assert next(loaded) == 0
        assert loading[1].wait(600)
        assert not loading[2].wait(0.1)


def test_an_error_is_raised_in_its_step_and_nothing_is_loaded_after_it() -> None:
    calls: list[int] = []

    def load(step: int) -> int:
        calls.append(step)
        if step == 2:
            raise OSError("the disk went away")
        return step

    with prefetched(load, range(9)) as loaded:
        assert [next(loaded), next(loaded)] == [0, 1]
        with pytest.raises(OSError, match="the disk went away"):
            next(loaded)
    assert calls == [0, 1, 2]
