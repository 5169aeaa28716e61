"""Samples, and the micro-batches made of them."""

from __future__ import annotations

import numpy as np
import pytest

from launch.data.batches import Batches, Sample, SequenceSampler
from launch.data.corpus import CorpusError
from model.kernels.linear_cross_entropy import IGNORED_LABEL
from tests.unit.made_corpora import corpus_of


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize(("tokens", "windows"), [(101, 11), (110, 11), (111, 12), (11, 2), (7000, 700), (6407, 641)])
def test_every_token_is_an_input_once_an_epoch_tail_included(tokens: int, windows: int, packing: str) -> None:
    lengths = np.random.default_rng(tokens).integers(1, 25, tokens)
    lengths = lengths[np.cumsum(lengths) < tokens].tolist()
    sampler = SequenceSampler(corpus_of(*lengths, tokens - sum(lengths)), 10, 0, packing)
    assert sampler.num_windows == windows
    orders = []
    for epoch in range(3):
        order = sampler.windows(np.arange(windows) + epoch * windows)
        samples = [sampler.sample(window) for window in order.tolist()]
        inputs = np.concatenate([s.input_ids for s in samples])
        labels = np.concatenate([s.labels for s in samples])
        learned = labels != IGNORED_LABEL
        # Token i of this corpus is i: each is an input with the next as its label, but for the last, which has no next.
        assert sorted(inputs[learned].tolist()) == list(range(tokens - 1))
        assert (labels[learned] == inputs[learned] + 1).all()
        assert (inputs == tokens - 1).sum() == 1
        assert len(inputs) - tokens == (~learned).sum() - 1 < 10  # the padding: zeros, less than a sequence
        orders.append(order.tolist())
    if windows > 2:
        assert orders[0] != orders[1] != orders[2]


def test_a_corpus_shorter_than_a_sequence_is_refused_with_both_numbers() -> None:
    with pytest.raises(CorpusError, match="training corpus has 10 tokens, but one sequence takes 11 .*add text"):
        SequenceSampler(corpus_of(10), 10, seed=0)
    with pytest.raises(CorpusError, match="validation corpus has 3 tokens.*raise data.validation_fraction"):
        SequenceSampler(corpus_of(3, name="validation"), 10, seed=0)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_layout_does_not_change_the_global_batch(data_parallel_size: int, micro_batch_size: int) -> None:
    sampler = SequenceSampler(corpus_of(*[37] * 20), 16, seed=5)  # 47 windows: steps cross the epoch's end
    ranks = [Batches(sampler, 8, micro_batch_size, data_parallel_size, rank) for rank in range(data_parallel_size)]
    for step in range(12):
        expected = [sampler.sample(w).input_ids.tolist() for w in sampler.windows(np.arange(8) + 8 * step).tolist()]
        parts = [rank.micro_batches(step) for rank in ranks]
        assert {len(part) for part in parts} == {8 // micro_batch_size // data_parallel_size}
        rows = [
            row
            for accumulation in zip(*parts, strict=True)
            for micro_batch in accumulation
            for row in micro_batch.input_ids.tolist()
        ]
        assert rows == expected


def test_micro_batch_without_document_mask() -> None:
    sampler = SequenceSampler(corpus_of(7, 5, 100), 8, seed=0)
    [micro_batch] = Batches(sampler, 2, 2, 1, 0).micro_batches(0)
    assert micro_batch.input_ids.shape == micro_batch.labels.shape == micro_batch.position_ids.shape == (2, 8)
    assert {a.dtype for a in (micro_batch.input_ids, micro_batch.labels, micro_batch.position_ids)} == {np.dtype("i8")}
    assert micro_batch.position_ids.tolist() == [list(range(8))] * 2
    assert micro_batch.boundaries is None


def test_document_mask_restarts_positions_and_gives_row_major_boundaries() -> None:
    lengths = (3, 5, 4, 9, 1, 1, 33)
    corpus = corpus_of(*lengths)
    sampler = SequenceSampler(corpus, 8, seed=0)
    position_of = [p for length in lengths for p in range(length)]  # inside its document
    for micro_batch in Batches(sampler, 6, 3, 1, 0, document_mask=True).micro_batches(0):
        expected_boundaries = []
        for row in range(3):
            ids, positions = micro_batch.input_ids[row].tolist(), micro_batch.position_ids[row].tolist()
            entered = [i for i in range(8) if i == 0 or position_of[ids[i]] == 0]
            expected_boundaries += [row * 8 + i for i in entered]
            assert positions == [i - max(e for e in entered if e <= i) for i in range(8)]
        assert micro_batch.boundaries == (*expected_boundaries, 24)


def test_padding_is_a_document_of_its_own() -> None:
    sampler = SequenceSampler(corpus_of(6, 5), 8, seed=0)
    samples = {int(sample.input_ids[0]): sample for sample in sampler.samples(np.arange(2))}
    assert samples[0].document_starts.tolist() == [6]
    assert samples[8].input_ids.tolist() == [8, 9, 10, 0, 0, 0, 0, 0]
    assert samples[8].labels.tolist() == [9, 10, *[IGNORED_LABEL] * 6]
    assert samples[8].document_starts.tolist() == [3]


def test_batches_have_no_state() -> None:
    batches = Batches(SequenceSampler(corpus_of(1000), 10, seed=0), 4, 2, 1, 0)
    forwards = [batches.micro_batches(step)[1].input_ids.tolist() for step in range(5)]
    backwards = [batches.micro_batches(step)[1].input_ids.tolist() for step in reversed(range(5))]
    assert forwards == backwards[::-1]
    assert forwards[0] != forwards[1]


def test_validation_sees_each_window_once_and_blanks_the_rest() -> None:
    sampler = SequenceSampler(corpus_of(61, name="validation"), 10, seed=0)  # 7 windows in batches of 4

    def rows(evaluation_batches: int) -> list[tuple[list[int], list[int]]]:
        out = []
        for rank in range(2):
            for micro_batches in Batches(sampler, 4, 1, 2, rank, limit=sampler.num_windows).once(evaluation_batches):
                assert len(micro_batches) == 2
                for one in micro_batches:
                    out.append((one.input_ids[0].tolist(), one.labels[0].tolist()))
        return out

    assert len(rows(1)) == 4
    everything = rows(8)
    assert everything == rows(8)
    assert len(everything) == 8
    real = [(i, label) for ids, labels in everything for i, label in zip(ids, labels, strict=True) if label >= 0]
    assert sorted(i for i, _ in real) == list(range(60))
    assert all(label == i + 1 for i, label in real)


def test_a_digest_tells_every_part_of_a_sample_apart() -> None:
    ids, labels, starts = np.arange(6), np.arange(1, 7), np.array([2, 4])
    sample = Sample(ids, labels, starts)
    others = [Sample(ids + 1, labels, starts), Sample(ids, labels + 1, starts), Sample(ids, labels, starts[:1])]
    digests = [sample.digest(0), sample.digest(1), sample.digest(1 << 60), *(other.digest(0) for other in others)]
    assert len(set(digests)) == 6 and all(0 <= digest < 1 << 64 for digest in digests)
    assert sample.digest(0) == 9849140633369562616, "runs are audited by what earlier versions have noted"
