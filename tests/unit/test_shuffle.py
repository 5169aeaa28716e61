"""The order of windows: a permutation that nobody has to store."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from launch.config import JobConfig
from launch.data.corpora import Corpora, samplers
from launch.data.shuffle import Permutation
from tests.unit.made_corpora import corpus_of


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    images = Permutation(size, seed=3, stream="epoch 0")(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


def test_permutation_depends_on_seed_and_stream_and_nothing_else() -> None:
    everything = np.arange(1000)
    base = Permutation(1000, 3, "epoch 0")
    assert (base(everything) == Permutation(1000, 3, "epoch 0")(everything)).all()
    assert (base(everything[::-1]) == base(everything)[::-1]).all()
    for other in (Permutation(1000, 4, "epoch 0"), Permutation(1000, 3, "epoch 1")):
        assert (base(everything) == other(everything)).sum() < 10


def test_permutation_keeps_its_order_across_versions() -> None:
    """A changed order would silently repeat and lose data in every run that is resumed."""
    assert Permutation(1000, 0, "epoch 0")(np.arange(6)).tolist() == [669, 970, 608, 933, 282, 243]


def test_permutation_spreads_neighbours() -> None:
    images = Permutation(1 << 16, 0, "epoch 0")(np.arange(1 << 16))
    assert abs(float(np.corrcoef(images, np.arange(1 << 16))[0, 1])) < 0.02
    assert np.abs(np.diff(images)).mean() == pytest.approx((1 << 16) / 3, rel=0.02)  # of two uniform draws
    quarters = np.bincount(images[: 1 << 14] >> 14, minlength=4)  # where the first quarter goes
    assert (np.abs(quarters - (1 << 12)) < 300).all()


def test_permutation_of_a_trillion_tokens_costs_nothing_to_build() -> None:
    windows = 10**12 // 4096
    tracemalloc.start()
    permutation = Permutation(windows, 0, "epoch 0")
    images = permutation(np.arange(1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20  # bytes: nothing is made for each window
    assert len(set(images.tolist())) == 1000
    assert images.max() < windows


def test_corpora_of_one_size_have_orders_of_their_own() -> None:
    job = JobConfig.from_yaml(
        """
        model: {vocab_size: 9, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
                num_key_value_heads: 1}
        data: {source: indexed, blend: [{path: a}, {path: b}]}
        optimizer: {learning_rate: 0.1}
        training: {sequence_length: 10, global_batch_size: 1, max_steps: 1}
        """
    )
    corpus = corpus_of(1000)
    drawn = samplers(Corpora({"a": corpus, "b": corpus}, corpus), job)
    first, second = (sampler.windows(np.arange(100)).tolist() for sampler in drawn.values())
    assert sorted(first) == sorted(second) and first != second
