"""The order of a blend's samples: shares, the history of weights, nothing repeated and nothing lost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.batches import Batches, Sample, SequenceSampler
from launch.data.blend import _STRIDE, Blend, _sum_of_floors
from launch.data.corpus import Corpus, CorpusError
from launch.data.cursor import BlendedSamples, DataCursor, Segment
from launch.data.packing import best_fit
from launch.data.skipped import StepRanges, in_words, steps_made, steps_skipped
from model.kernels.linear_cross_entropy import IGNORED_LABEL

LENGTH = 8
SIZES = {"web": 1003, "code": 400, "books": 77}
FIRST = {"web": 0, "code": 10_000, "books": 20_000}
"""Token i of a corpus is FIRST + i, so that every position is recognisable."""


def corpus(name: str) -> Corpus:
    lengths = np.random.default_rng(len(name)).integers(1, 20, SIZES[name])
    lengths = lengths[np.cumsum(lengths) < SIZES[name]].tolist()
    tokens = np.arange(SIZES[name], dtype=np.int32) + FIRST[name]
    return Corpus.from_documents(name, tokens, [*lengths, SIZES[name] - sum(lengths)], f"print of {name}")


CORPORA = {name: corpus(name) for name in SIZES}


def cursor(weights: dict[str, float], size: int = 4, packing: str = "split", seed: int = 0) -> DataCursor:
    prints = {name: CORPORA[name].fingerprint for name in weights}
    return DataCursor(seed, LENGTH, packing, prints, (Segment(0, size, weights),))


def blended(at: DataCursor) -> BlendedSamples:
    names = at.history[-1].weights
    return BlendedSamples(
        {name: SequenceSampler(CORPORA[name], LENGTH, at.seed, at.packing, f"{name} ") for name in names}, at
    )


def run(at: DataCursor, start: int, stop: int, size: int, dp: int = 1, micro: int = 1) -> Iterator[list[Sample]]:
    """The global batches of steps start..stop-1, put together from all data-parallel ranks."""
    for step in range(start, stop):
        rows: dict[int, Sample] = {}
        for rank in range(dp):
            seen: list = []
            note = partial(lambda into, *noted: into.append(noted), seen)
            batches = Batches(blended(at), size, micro, dp, rank, offset=at.offset, note=note)
            batches.micro_batches(step)
            [(noted_step, indices, samples)] = seen
            assert noted_step == step
            rows |= dict(zip(indices.tolist(), samples, strict=True))
        yield [rows[index] for index in sorted(rows)]


def is_skipped(step: int, skipped: StepRanges) -> bool:
    return any(first <= step + 1 <= last for first, last in skipped)


# --- the blend ---


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 120), st.integers(0, 120))
def test_sum_of_floors(n: int, m: int, a: int, b: int) -> None:
    assert _sum_of_floors(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.integers(0, 3000))
def test_counts_are_those_of_the_order_and_near_the_weights(weights: list[float], seed: int, samples: int) -> None:
    named = {str(index): weight for index, weight in enumerate(weights)}
    if not any(weights):
        return
    blend = Blend(named, seed)
    drawn = Counter(blend.names[index] for index in blend.corpora(np.arange(samples)).tolist())
    assert blend.counts(samples) == {name: drawn[name] for name in blend.names}
    for name, weight in named.items():
        assert drawn[name] == 0 if weight == 0 else abs(drawn[name] - samples * weight / sum(weights)) < 4


def test_a_sample_on_the_edge_of_two_shares_is_counted_where_it_is_drawn() -> None:
    blend, circle = Blend({"a": 1, "b": 1}, 3), 1 << 64
    points = [(blend._phase + sample * _STRIDE) % circle for sample in range(40)]
    for point in points:
        for edge in (point, point + 1):
            assert blend._points_below(edge, 40) == sum(other < edge for other in points)
        blend._edges = np.array([point], dtype=np.uint64)
        assert blend.corpora(np.arange(40)).tolist() == [int(other >= point) for other in points]


def test_counts_of_a_trillion_samples_follow_from_the_stretches_between() -> None:
    blend, far = Blend({"a": 0.6, "b": 0.3, "c": 0.1}, 7), 10**12
    near = blend.corpora(np.arange(far, far + 5000))
    before, after = blend.counts(far), blend.counts(far + 5000)
    assert [after[name] - before[name] for name in blend.names] == np.bincount(near).tolist()
    assert after["a"] == pytest.approx(0.6 * far, rel=1e-8)
    assert blend.counts(10**9)["a"] == pytest.approx(0.6 * 10**9, abs=20)


def test_the_order_of_a_blend_is_kept_across_versions() -> None:
    """A changed order would silently repeat and lose data in every run that is resumed."""
    order = Blend({"a": 0.5, "b": 0.3, "c": 0.2}, 0).corpora(np.arange(12))
    assert order.tolist() == [
        1,
        0,
        2,
        1,
        0,
        2,
        0,
        0,
        1,
        0,
        2,
        1,
    ]


# --- packing ---


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(4, 32))
def test_best_fit_loses_nothing_and_cuts_little(lengths: list[int], length: int) -> None:
    ends = np.cumsum(lengths)
    documents = list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))
    windows = best_fit(documents, length)
    assert len(windows) == -(-int(ends[-1]) // length)
    tokens = [token for window in windows for start, stop in window for token in range(start, stop)]
    assert sorted(tokens) == list(range(ends[-1]))
    assert all(sum(stop - start for start, stop in window) <= length for window in windows)
    for window in windows:  # in order, none empty, and neighbours as one: where a stretch begins, so does a document
        assert all(start < stop for start, stop in window)
        assert all(one[1] < other[0] for one, other in pairwise(window))


def test_best_fit_by_hand() -> None:
    """The order of the data: no version may change it, or a resumed run would repeat some documents and lose others."""
    lengths = [3, 9, 5, 2, 7, 4]  # in windows of 8: 8 of the 9, then 7, 5, 4, 3 beside 5, 2 beside 4, 1 beside 7
    ends = np.cumsum(lengths).tolist()
    documents = list(zip([0, *ends], ends, strict=False))
    assert best_fit(documents, 8) == [[(3, 11)], [(11, 12), (19, 26)], [(0, 3), (12, 17)], [(17, 19), (26, 30)]]
    # 6, then 4 and the first 3; the other 3 fits nowhere and is cut for the gaps of 2 and 1, window after window
    assert best_fit([(0, 3), (3, 9), (9, 12), (12, 16)], 8) == [[(3, 11)], [(0, 3), (11, 16)]]


def test_best_fit_cuts_a_fraction_of_the_documents_that_split_cuts() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 4000).astype(int) + 1
    text = Corpus.from_documents("text", np.zeros(lengths.sum(), np.uint16), lengths, "x")
    edges = np.cumsum(lengths)

    def cut_without_need(packing: str) -> int:
        """Documents that are cut though they fit in a sequence."""
        sampler = SequenceSampler(text, 2048, 0, packing)
        ends = [stop for window in range(sampler.num_windows) for _, stop in sampler.stretches(window)]
        documents = np.unique(np.searchsorted(edges, np.setdiff1d(ends, edges)))
        return int((lengths[documents] <= 2048).sum())

    assert cut_without_need("best_fit") < 0.15 * cut_without_need("split")


# --- the cursor ---


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize(("dp", "micro"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_the_layout_does_not_change_the_global_batches_of_a_blend(packing: str, dp: int, micro: int) -> None:
    at = cursor({"web": 0.5, "code": 0.3, "books": 0.2}, packing=packing)
    for one, other in zip(run(at, 0, 9, 4), run(at, 0, 9, 4, dp, micro), strict=True):
        assert [sample.input_ids.tolist() for sample in one] == [sample.input_ids.tolist() for sample in other]


def test_a_corpus_that_gives_nothing_is_not_among_what_is_drawn() -> None:
    """The audit then needs it not. By its weight, or because none of these few samples is its."""
    at = cursor({"web": 0.5, "code": 0.5, "books": 0})
    assert at.draws(np.arange(64)).keys() == {"web", "code"}
    assert [len(at.draws(np.array([sample]))) for sample in range(8)] == [1] * 8


def test_the_order_is_of_the_seed() -> None:
    at = cursor({"web": 0.7, "code": 0.3}, seed=7)
    order = Blend(at.history[0].weights, 7).corpora(np.arange(64)).tolist()
    drawn = at.draws(np.arange(64))
    assert [drawn[name][0].tolist() for name in ("web", "code")] == [
        [place for place, index in enumerate(order) if index == wanted] for wanted in (0, 1)
    ]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_weights_change_on_resume_and_every_token_is_seen_once_an_epoch(packing: str) -> None:
    """Other weights, a corpus added, one dropped and taken up again, another global batch size."""
    starts = [
        (0, 4, {"web": 0.7, "code": 0.3}),
        (30, 4, {"web": 0.2, "code": 0.8}),
        (41, 8, {"web": 0.5, "books": 0.5}),
        (60, 4, {"code": 0.1, "web": 0.6, "books": 0.3}),
    ]
    at, drawn = cursor(starts[0][2], packing=packing), []
    for (start, size, weights), stop in zip(starts, [30, 41, 60, 120], strict=True):
        fresh = cursor(weights, size, packing)
        at = DataCursor.from_record(json.loads(json.dumps(at.record()))).continued(start, fresh) if start else fresh
        for batch in run(at, start, stop, size):
            drawn += batch
    assert len(drawn) == at.first_sample(120) == 4 * 30 + 4 * 11 + 8 * 19 + 4 * 60
    for name, size in SIZES.items():
        windows = -(-size // LENGTH)
        mine = [s for s in drawn if FIRST[name] <= s.input_ids[0] < FIRST[name] + 10_000]
        assert len(mine) == at.given(len(drawn))[name]
        assert len(mine) > windows or name == "web"
        for epoch in range(0, len(mine), windows):
            samples = mine[epoch : epoch + windows]
            tokens = np.concatenate([sample.input_ids[sample.labels != IGNORED_LABEL] for sample in samples])
            assert len(set(tokens.tolist())) == len(tokens), "a token was repeated"
            if len(samples) == windows:
                assert sorted(tokens.tolist()) == list(range(FIRST[name], FIRST[name] + size - 1)), "a token was lost"


def test_a_resume_without_a_change_adds_nothing_to_the_history() -> None:
    at = cursor({"web": 0.7, "code": 0.3})
    assert at.continued(30, at) == at
    changed = at.continued(30, cursor({"web": 0.5, "code": 0.5}))
    assert [segment.step for segment in changed.history] == [0, 30]
    assert [step for step in (0, 29, 30, 31) if changed.changes_at(step)] == [30] and not at.changes_at(0)
    assert at.continued(1, cursor({"web": 1})).changes_at(1)
    assert changed.continued(30, at) == at  # thought better of it before a step was done
    assert changed.continued(50, cursor({"web": 0.5, "code": 0.5})) == changed


def test_a_resume_onto_other_data_is_refused() -> None:
    at = cursor({"web": 0.7, "code": 0.3})
    for change, match in (
        ({"seed": 1}, r"job.seed was 0 up to step 30 and is 1 now; .*set job.seed=0"),
        ({"sequence_length": 16}, r"training.sequence_length was 8 up to step 30 and is 16 now"),
        ({"packing": "best_fit"}, r"data.packing was split up to step 30 and is best_fit now"),
        ({"corpora": {"web": "another", "code": at.corpora["code"]}},
         r"other data \(corpus web: fingerprint print of web, here another\)"),
    ):  # fmt: skip
        with pytest.raises(CorpusError, match=match):
            at.continued(30, replace(at, **change))  # type: ignore[arg-type]
        begun = at.continued(30, replace(at, **change), ("data",))  # type: ignore[arg-type]
        assert [segment.step for segment in begun.history] == [30]
        late = replace(begun, skipped=((5, 8), (32, 32)))  # of the old data, and of the new
        assert late.read(33).total() == 8
        assert begun.first_sample(30) == 0 and begun.first_sample(32) == 8 == begun.offset + 32 * 4
    assert at.continued(30, replace(at, seed=1), ("job.seed",)).first_sample(30) == 0
    with pytest.raises(CorpusError, match="other data"):
        at.continued(30, replace(at, corpora={"web": "another", "code": at.corpora["code"]}), ("job.seed",))


def test_a_damaged_record_is_refused_by_what_is_wrong_with_it() -> None:
    record = cursor({"web": 0.7, "code": 0.3}).record()
    [segment] = record["history"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format": 2}, "format 2, this program reads 1"),
        ({"more": 1}, "more: Unexpected keyword argument"),
        ({"seed": "0"}, "seed: Input should be a valid integer"),
        ({"history": []}, "history: Tuple should have at least 1 item"),
        *(
            ({"history": [segment | change]}, rf"history\.0.*{said}")
            for change, said in (
                ({"step": -1}, "step: Input should be greater than or equal to 0"),
                ({"global_batch_size": 0}, "global_batch_size: Input should be greater than or equal to 1"),
                ({"weights": {"web": 2, "code": -1}}, "weights.code: Input should be greater than or equal to 0"),
                ({"weights": {"web": math.inf}}, "weights.web: Input should be a finite number"),
                ({"weights": {"web": 0}}, "weights .* leave nothing to read"),
            )
        ),
        ({"history": [segment, segment | {"step": 9}, segment | {"step": 9}]}, r"\[0, 9, 9\] do not ascend"),
        ({"history": [segment | {"step": 9}, segment]}, r"\[9, 0\] do not ascend"),
        ({"corpora": {"code": ""}}, "the history names corpora without a fingerprint: web"),
    ]
    damaged: list[tuple[Any, str]] = [(record | change, said) for change, said in changes]
    for broken, said in [*damaged, ({}, "KeyError"), ([], "AttributeError"), (record | {"seed": {1}}, "TypeError")]:
        with pytest.raises(CorpusError, match=rf"the record of what the run has read is not readable \(.*{said}"):
            DataCursor.from_record(broken)


# --- steps that are left out ---


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(0, 40), st.integers(0, 40))
def test_steps_left_out_and_made_are_all_of_them(gaps: list[int], start: int, stop: int) -> None:
    edges = np.cumsum([gap + 1 for gap in gaps])[: len(gaps) // 2 * 2].tolist()
    skipped = tuple((first, last) for first, last in zip(edges[::2], edges[1::2], strict=True))
    left_out = [step for step in range(start, stop) if is_skipped(step, skipped)]
    assert [*steps_made(skipped, start, stop)] == [step for step in range(start, stop) if step not in left_out]
    assert [step for steps in steps_skipped(skipped, start, stop) for step in steps] == left_out
    assert in_words([range(10, 20), range(30, 31)]) == "steps 11 to 20, 31" and in_words([]) == "no step"


@pytest.mark.parametrize(("packing", "dp", "micro"), [("split", 1, 2), ("best_fit", 2, 1)])
def test_every_other_step_reads_what_it_would_have_read(packing: str, dp: int, micro: int) -> None:
    """Over changes of the weights and of the global batch size, inside the skipped steps too, and several epochs."""
    skipped = ((5, 8), (29, 36), (44, 44))
    starts = [(0, 4, {"web": 0.7, "code": 0.3}), (30, 8, {"web": 0.2, "code": 0.8}), (40, 4, {"books": 1, "web": 1})]
    at = whole = cursor(starts[0][2], packing=packing)
    read: Counter[str] = Counter()
    for (start, size, weights), stop in zip(starts, [30, 40, 60], strict=True):
        fresh = cursor(weights, size, packing)
        whole = whole.continued(start, fresh)
        record = json.loads(json.dumps(replace(at, skipped=skipped).record()))
        at = DataCursor.from_record(record).continued(start, replace(fresh, skipped=skipped))
        everything = dict(zip(range(start, stop), run(whole, start, stop, size), strict=True))
        batches = Batches(blended(at), size, micro, dp, 0, offset=at.offset, skipped=at.skipped)
        assert [*batches.steps(start, stop)] == [step for step in everything if not is_skipped(step, skipped)]
        for step in batches.steps(start, stop):
            [batch] = run(at, step, step + 1, size, dp, micro)
            assert [s.input_ids.tolist() for s in batch] == [s.input_ids.tolist() for s in everything[step]]
            assert at.read(step) == read
            read.update(max((i, name) for name, i in FIRST.items() if i <= s.input_ids[0])[1] for s in batch)
    assert at.read(60) == read and sum(read.values()) == whole.first_sample(60) - 4 * 4 - 4 * 2 - 8 * 6 - 4


def test_steps_that_are_over_stay_read_or_skipped() -> None:
    at = replace(cursor({"web": 1}), skipped=((5, 8), (40, 49)))
    for ahead in ((), ((31, 31),), ((30, 36), (50, 90))):  # the checkpoint is of step 29
        assert at.continued(29, replace(at, skipped=((5, 8), *ahead))).skipped == ((5, 8), *ahead)
    assert at.continued(4, replace(at, skipped=())).skipped == (), "of a checkpoint before them"
    for skipped, match in [
        ((), "left out steps 5 to 8 up to step 30 and leaves out no step of them now"),
        (((1, 1), (5, 8)), "left out steps 5 to 8 up to step 30 and leaves out steps 1, 5 to 8 of them now"),
        (((5, 9), (40, 49)), "left out steps 5 to 8 up to step 30 and leaves out steps 5 to 9 of them now"),
        (((5, 8), (30, 49)), "left out steps 5 to 8 up to step 30 and leaves out steps 5 to 8, 30 of them now"),
    ]:
        with pytest.raises(CorpusError, match=rf"training.skip_steps {match}; .* \(python launch/rollback.py RUN"):
            at.continued(30, replace(at, skipped=skipped))
    older = {key: value for key, value in at.record().items() if key != "skipped"}
    assert DataCursor.from_record(older) == replace(at, skipped=())
    for skipped in ([[5, 8], [7, 9]], [[8, 5]], [[5, 6, 7]], [["5", 8]], 5):
        with pytest.raises(CorpusError, match="the record of what the run has read is not readable"):
            DataCursor.from_record(at.record() | {"skipped": skipped})
