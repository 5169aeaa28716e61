"""Corpora, their split, the order of samples, and the micro-batches made of them."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from launch import sources
from launch.bigram import conditional_bigram_entropy
from launch.config import JobConfig
from launch.corpora import Corpora, samplers
from launch.corpus import Corpus, CorpusError, Int64
from launch.data import IGNORED_LABEL, Batches, MicroBatch, SequenceSampler, validation_batches
from launch.encoders import TokenizerEncoder
from launch.prefetch import Prefetcher
from launch.shuffle import Permutation
from launch.sources import load_text
from launch.split import split_corpus


def corpus_of(*lengths: int, name: str = "training") -> Corpus:
    """Documents of these lengths; token i of the corpus is i, so that every position is recognisable."""
    return Corpus.from_documents(name, np.arange(sum(lengths), dtype=np.uint32), lengths, "test")


def edges(corpus: Corpus) -> list[int]:
    """Where the documents begin, and the corpus's end."""
    return [0, *corpus.document_starts(0, len(corpus)).tolist(), len(corpus)]


def contents(corpus: Corpus) -> Int64:
    return corpus.read(0, len(corpus))


# --- the permutation ---


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
    start = time.perf_counter()
    permutation = Permutation(windows, 0, "epoch 0")
    images = permutation(np.arange(1000))
    assert time.perf_counter() - start < 1.0
    assert len(set(images.tolist())) == 1000
    assert images.max() < windows


# --- the corpus ---


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


# --- sources ---


def test_the_standard_library_is_real_text_and_always_the_same() -> None:
    corpus = load_text(source="python_stdlib", vocab_size=256)
    assert len(corpus) > 5_000_000
    assert corpus.num_documents > 300
    assert corpus.fingerprint == load_text(source="python_stdlib", vocab_size=256).fingerprint
    labels = [file.label for file in sources._standard_library()]
    assert labels == sorted(labels)
    assert "argparse.py" in labels and "json/decoder.py" in labels
    assert not [one for one in labels if {"test", "tests", "site-packages"} & set(one.split("/"))]
    training, validation = split_corpus(corpus, 0.05, seed=0)
    assert validation is not None
    assert 2.2 < conditional_bigram_entropy(validation.read(0, len(validation))) < 2.6


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three files: 11, 0 and 9 bytes."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("the cat sat")
    (folder / "b.txt").write_text("")
    (folder / "deep" / "c.txt").write_text("a cat sat")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words, with [BOS] put before every text by the tokenizer's own post-processor."""
    words = {"[UNK]": 0, "[BOS]": 1, "the": 2, "cat": 3, "sat": 4, "a": 5}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_files_as_bytes(texts: Path) -> None:
    corpus = load_text(source="files", files=[f"{texts}/**/*.txt", f"{texts}/a.txt"], vocab_size=256)
    assert bytes(corpus.read(0, len(corpus)).astype(np.uint8)) == b"the cat sata cat sat"
    assert edges(corpus) == [0, 11, 20]


def test_files_relative_to_the_working_directory(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    assert len(load_text(source="files", files=["*.txt"], vocab_size=128)) == 11


def test_files_through_a_tokenizer_are_cached_and_mapped(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    def load() -> Corpus:
        return load_text(
            source="files",
            files=[f"{texts}/**/*.txt"],
            tokenizer=str(tokenizer),
            vocab_size=6,
            cache_directory=tmp_path / "cache",
        )

    first = load()
    assert first.read(0, len(first)).tolist() == [1, 2, 3, 4, 1, 1, 5, 3, 4]  # the empty file is a lone [BOS]
    assert mapped(first)
    [entry] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    written = (entry / "tokens.bin").stat().st_mtime_ns
    assert load().fingerprint == first.fingerprint
    assert (entry / "tokens.bin").stat().st_mtime_ns == written
    (texts / "a.txt").write_text("the cat")  # another size and time: another entry
    assert load().read(0, 3).tolist() == [1, 2, 3]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def mapped(corpus: Corpus) -> bool:
    """Whether the tokens lie in a file."""
    base: object = corpus.shards[0].tokens
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


def test_large_byte_corpora_go_through_the_cache(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_text(source="files", files=[f"{texts}/*.txt"], vocab_size=256)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 4)
    kept = load_text(source="files", files=[f"{texts}/*.txt"], vocab_size=256, cache_directory=tmp_path / "cache")
    assert mapped(kept) and not mapped(plain)
    assert kept.fingerprint == plain.fingerprint
    assert (kept.read(0, 11) == plain.read(0, 11)).all()


def _load_in_process(texts: Path, tokenizer: Path, cache: Path, log: Path, together: Barrier) -> None:
    encode = TokenizerEncoder.encode

    def recorded(self: TokenizerEncoder, paths: list[Path], contents: list[bytes]) -> list[sources.Tokens]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return encode(self, paths, contents)

    TokenizerEncoder.encode = recorded  # type: ignore[method-assign,assignment]
    together.wait()
    files = [f"{texts}/**/*.txt"]
    corpus = load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=6, cache_directory=cache)
    assert len(corpus) == 9


def test_one_process_tokenises_and_the_others_wait(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(3)
    arguments = (texts, tokenizer, tmp_path / "cache", tmp_path / "log", together)
    processes = [context.Process(target=_load_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_killed_builder_leaves_nothing_that_is_believed(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = [f"{texts}/**/*.txt"]
    with pytest.raises(CorpusError, match="token id 5"):
        load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=5, cache_directory=cache)
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    entry.rename(entry.with_name(entry.name + ".partial"))  # the state just before the last rename
    corpus = load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=6, cache_directory=cache)
    assert len(corpus) == 9
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [entry.name]
    with open(entry / "tokens.bin", "r+b") as file:
        file.truncate(4)
    with pytest.raises(CorpusError, match=r"damaged \(.*4 bytes instead of the 18 of .*\); delete that folder"):
        load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=6, cache_directory=cache)


def test_errors_of_sources_say_what_to_do(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    def refuse(match: str, *files: str, tokenizer: str = "bytes", vocab_size: int = 256) -> None:
        with pytest.raises(CorpusError, match=match):
            load_text(
                source="files",
                files=files,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                cache_directory=tmp_path / "cache",
            )

    refuse("data.files is empty")
    refuse(r"no file matches '.*\*.md'", f"{texts}/*.txt", f"{texts}/*.md")
    refuse(r"corpus is empty: 1 files, 0 tokens", f"{texts}/b.txt")
    refuse(r"token id 116 \(data.tokenizer: bytes\), beyond model.vocab_size \(100\); .* at least 256",
           f"{texts}/a.txt", vocab_size=100)  # fmt: skip
    refuse(r"token id 4 .*beyond model.vocab_size \(4\); .* at least 6",
           f"{texts}/a.txt", tokenizer=str(tokenizer), vocab_size=4)  # fmt: skip
    refuse(r"'/nowhere.json' cannot be read", f"{texts}/a.txt", tokenizer="/nowhere.json")
    refuse(r"a.txt' is no tokenizer.json", f"{texts}/a.txt", tokenizer=f"{texts}/a.txt")
    (texts / "binary.txt").write_bytes(b"text\0text")
    refuse(r"binary.txt: binary, not text \(NUL at byte 4\); .*data.tokenizer: bytes",
           f"{texts}/*.txt", tokenizer=str(tokenizer))  # fmt: skip
    (texts / "binary.txt").write_bytes(b"caf\xe9 au lait")
    refuse(r"binary.txt: not UTF-8 text \(at byte 3\); .*data.tokenizer: bytes",
           f"{texts}/*.txt", tokenizer=str(tokenizer))  # fmt: skip
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert len(load_text(source="files", files=[f"{texts}/*.txt"], vocab_size=256)) == 23
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").write_text("a file where the folder should be")
    refuse(r"token cache .*cache cannot be used .*data.cache_directory",
           f"{texts}/a.txt", tokenizer=str(tokenizer))  # fmt: skip


# --- samples and batches ---


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
            for micro_batches in validation_batches(
                sampler,
                evaluation_batches=evaluation_batches,
                global_batch_size=4,
                micro_batch_size=1,
                data_parallel_size=2,
                dp_rank=rank,
            ):
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


# --- prefetching ---


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
        assert loaded[1].wait(10)
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
