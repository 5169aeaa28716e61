"""A corpus as runs of documents, what is held out of it, and its bigram entropy."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.bigram import conditional_bigram_entropy
from launch.data.corpora import Corpora
from launch.data.corpus import Corpus, CorpusError
from launch.data.validation_split import split_corpus
from tests.unit.made_corpora import contents, corpus_of, edges


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.data())
def test_read_and_document_starts_match_a_list(lengths: list[int], data: st.DataObject) -> None:
    corpus = corpus_of(*lengths)
    keep = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    chosen = np.array(keep, dtype=bool)
    begins = np.cumsum([0, *lengths])
    part = corpus.select("part", np.zeros(chosen.sum(), np.int64), begins[:-1][chosen], np.diff(begins)[chosen])
    flat = [t for d in range(len(lengths)) if keep[d] for t in range(begins[d], begins[d + 1])]
    kept = np.cumsum([0, *(length for length, yes in zip(lengths, keep, strict=True) if yes)]).tolist()
    assert part.num_documents == sum(keep)
    assert len(part) == len(flat)
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert part.read(start, stop).tolist() == flat[start:stop]
    inside = [o - start for o in kept if start < o < stop]
    assert part.document_starts(start, stop).tolist() == inside


def test_empty_documents_are_left_out() -> None:
    corpus = corpus_of(0, 3, 0, 0, 2, 0)
    assert corpus.num_documents == 2
    assert edges(corpus) == [0, 3, 5]


def test_split_is_by_document_disjoint_complete_and_near_the_fraction() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 500).tolist()
    corpus = corpus_of(*lengths)
    training, validation = split_corpus(corpus, 0.05, seed=1)
    assert validation is not None
    assert (training.name, validation.name) == ("training", "validation")
    assert 0.045 * len(corpus) < len(validation) <= 0.05 * len(corpus) + 1
    tokens = training.read(0, len(training)).tolist() + validation.read(0, len(validation)).tolist()
    assert sorted(tokens) == list(range(len(corpus)))
    assert training.num_documents + validation.num_documents == 500
    again, other = split_corpus(corpus, 0.05, seed=1)[1], split_corpus(corpus, 0.05, seed=2)[1]
    assert again is not None and other is not None
    assert again.fingerprint == validation.fingerprint != other.fingerprint
    assert set(contents(other).tolist()) != set(contents(validation).tolist())


@pytest.mark.parametrize("lengths", [(1000,), (400, 600)])
def test_split_cuts_the_end_of_the_largest_when_no_document_is_small_enough(lengths: tuple[int, ...]) -> None:
    training, validation = split_corpus(corpus_of(*lengths), 0.05, seed=0)
    assert validation is not None
    assert training.read(0, len(training)).tolist() == list(range(950))
    assert validation.read(0, len(validation)).tolist() == list(range(950, 1000))


def test_the_cut_ends_of_several_corpora_are_documents_of_their_own() -> None:
    """Each begins inside a document of its shard, which its validation corpus has no start of."""
    parts = [split_corpus(corpus_of(1000), 0.05, seed=0)[1] for _ in range(2)]
    validation = Corpus.concatenated("validation", [part for part in parts if part is not None])
    assert edges(validation) == [0, 50, 100]


def test_split_of_nothing() -> None:
    training, validation = split_corpus(corpus_of(5, 5), 0.0, seed=0)
    assert validation is None
    assert len(training) == 10


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60))
def test_bigram_entropy_matches_a_naive_count(tokens: list[int]) -> None:
    pairs, firsts = Counter(zip(tokens, tokens[1:], strict=False)), Counter(tokens[:-1])
    total = len(tokens) - 1
    naive = -sum(n / total * math.log(n / firsts[a]) for (a, _), n in pairs.items())
    assert conditional_bigram_entropy(tokens) == pytest.approx(naive, abs=1e-12)


def test_bigram_entropy_by_hand() -> None:
    assert conditional_bigram_entropy([7, 9] * 50) == 0.0  # the next token is certain
    assert conditional_bigram_entropy([0, 0, 0, 1, 0]) == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 4)
    with pytest.raises(CorpusError, match="at least 2 tokens, not 1"):
        conditional_bigram_entropy([5])


def test_ranks_that_read_other_texts_for_the_evaluation_are_told_apart() -> None:
    """One would evaluate more batches than the others, and wait for them without end."""

    def read(fingerprint: str) -> str:
        held_out = Corpus.from_documents("validation", np.zeros(9, np.uint8), [9], fingerprint)
        return Corpora({"a": corpus_of(7, 5)}, held_out).fingerprint

    assert read("one") == read("one") != read("another")
