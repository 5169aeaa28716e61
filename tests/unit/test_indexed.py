"""Megatron's indexed dataset: files of Megatron-Core's own builder, of GPT-NeoX's, and bad ones."""

from __future__ import annotations

import re
import struct
import warnings
from bisect import bisect_left
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config import JobConfig
from launch.data import indexed, indexed_writer
from launch.data.corpora import load_corpora, open_corpus
from launch.data.corpus import Corpus, CorpusError
from launch.data.indexed import HEADER, fingerprint, open_indexed, read_summary
from launch.data.indexed_writer import IndexedWriter
from launch.data.sorted_search import search_left
from launch.data.validation_split import GROUPS, split_corpus

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron-Core misses packages of NVIDIA's that its data set has no use for
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset as older_megatron

DATA_PAGE = Path(__file__).parents[2] / "docs" / "data.md"
DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


def documents(count: int, high: int, seed: int = 0) -> list[np.ndarray]:
    """Documents of 0 to 40 tokens below `high`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, high, rng.integers(0, 41)) for _ in range(count)]


def built_by_megatron(prefix: Path, texts: list[np.ndarray], dtype: type = np.uint16, pieces: int = 1) -> Path:
    """Written by Megatron-Core's builder, each document as `pieces` sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        for part in np.array_split(text, pieces):
            builder.add_item(torch.from_numpy(part.astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_what_megatron_writes_is_read(tmp_path: Path, dtype: type, pieces: int) -> None:
    texts = documents(200, 100)
    prefix = built_by_megatron(tmp_path / "web", texts, dtype, pieces)
    corpus = open_corpus(str(prefix), 100)
    theirs = IndexedDataset(str(prefix))
    assert len(theirs) == 200 * pieces
    assert corpus.read(0, len(corpus)).tolist() == np.concatenate([theirs[i] for i in range(len(theirs))]).tolist()
    ends = np.cumsum([len(text) for text in texts])
    assert corpus.document_starts(0, len(corpus)).tolist() == sorted(set(ends.tolist()) - {0, len(corpus)})
    for start, stop in ((0, 1), (13, 900), (len(corpus) - 7, len(corpus))):
        assert corpus.read(start, stop).tolist() == np.concatenate(texts)[start:stop].tolist()
        inside = {int(end) - start for end in ends if start < end < stop}
        assert corpus.document_starts(start, stop).tolist() == sorted(inside)


def built_as_by_gpt_neox(prefix: Path, texts: list[np.ndarray], dtype: type, merged: Path | None = None) -> Path:
    """Written by the builder of the older Megatron-LM that GPT-NeoX carries, in DeepSpeed's copy of it."""
    builder = older_megatron.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        builder.add_item(torch.from_numpy(text.astype(np.int64)))
        builder.end_document()
    if merged is not None:
        builder.merge_file_(str(merged))
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_gpt_neox_writes_is_read(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the layout that GPT-NeoX's own reader takes, stated here once more: offsets into two files."""
    neox = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float32, 7: np.float64, 8: np.uint16}
    codes = {code: (numpy_type, None) for code, numpy_type in neox.items()}
    monkeypatch.setattr(older_megatron, "dtypes", codes)  # DeepSpeed's copy numbers the last three otherwise
    texts, more = documents(120, 60000), documents(40, 60000, seed=1)
    second = built_as_by_gpt_neox(tmp_path / "second", more, dtype)
    prefix = built_as_by_gpt_neox(tmp_path / "text_document", texts, dtype, merged=second)
    raw, tokens = (prefix.with_suffix(suffix).read_bytes() for suffix in (".idx", ".bin"))
    assert raw[:9] == b"MMIDIDX\0\0" and struct.unpack_from("<QB", raw, 9) == (1, {np.uint16: 8, np.int32: 4}[dtype])
    items, entries = struct.unpack_from("<QQ", raw, 18)
    sizes = struct.unpack_from(f"<{items}i", raw, 34)
    addresses = struct.unpack_from(f"<{items}q", raw, 34 + 4 * items)
    document_ends = struct.unpack_from(f"<{entries}q", raw, 34 + 12 * items)
    assert (items, document_ends, len(raw)) == (160, tuple(range(161)), 34 + 12 * 160 + 8 * 161)
    read = [np.frombuffer(tokens, dtype, size, at) for size, at in zip(sizes, addresses, strict=True)]
    assert [one.tolist() for one in read] == [one.tolist() for one in [*texts, *more]]
    corpus = open_corpus(str(prefix), 60000)
    assert corpus.read(0, len(corpus)).tolist() == np.concatenate(read).tolist()
    ends = set(np.cumsum(sizes).tolist()) - {0, len(corpus)}
    assert corpus.document_starts(0, len(corpus)).tolist() == sorted(ends)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_what_we_write_is_what_megatron_writes(tmp_path: Path, dtype: str) -> None:
    texts = [text for text in documents(300, 60000) if len(text)]
    theirs = built_by_megatron(tmp_path / "theirs", texts, np.dtype(dtype).type)
    writer = IndexedWriter(tmp_path / "ours", np.dtype(dtype))
    for first in range(0, len(texts), 7):
        group = texts[first : first + 7]
        writer.write(np.concatenate(group), np.array([len(text) for text in group]))
    known = writer.finish()
    largest = max(int(text.max()) for text in texts)
    learned = {"tokens": sum(map(len, texts)), "documents": len(texts), "largest_token": largest}
    assert known == read_summary(tmp_path / "ours") == learned
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs.with_suffix(suffix).read_bytes()
    assert open_indexed(tmp_path / "ours").fingerprint == open_indexed(theirs).fingerprint
    tokens = np.concatenate(texts).astype(dtype)
    assert open_indexed(theirs).fingerprint == fingerprint(tokens, [len(text) for text in texts])
    assert sorted(path.name for path in tmp_path.glob("ours*")) == ["ours.bin", "ours.idx", "ours.summary.json"]


def test_a_document_too_long_for_a_sequence_becomes_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_writer, "LONGEST_SEQUENCE", 10)
    writer = IndexedWriter(tmp_path / "long", np.dtype("<u2"))
    writer.write(np.arange(37, dtype=np.uint16), np.array([20, 0, 4, 13]), continues=True)
    writer.write(np.arange(37, 43, dtype=np.uint16), np.array([2, 4]))
    writer.finish()
    theirs = IndexedDataset(str(tmp_path / "long"))
    assert [len(one) for one in theirs[:]] == [10, 10, 4, 10, 5, 4]
    assert theirs.document_indices.tolist() == [0, 2, 3, 5, 6]
    assert open_corpus(str(tmp_path / "long")).document_starts(0, 43).tolist() == [20, 24, 39]


def test_merged_files_that_lost_their_documents_have_one_for_each_sequence(tmp_path: Path) -> None:
    prefix = built_by_megatron(tmp_path / "merged", [np.arange(5), np.arange(3)])
    raw = prefix.with_suffix(".idx").read_bytes()
    entries = HEADER.size + 12 * 2
    header = HEADER.pack(*HEADER.unpack(raw[: HEADER.size])[:4], 1)
    prefix.with_suffix(".idx").write_bytes(header + raw[HEADER.size : entries] + raw[entries : entries + 8])
    assert open_corpus(str(prefix)).document_starts(0, 8).tolist() == [5]


def test_shards_of_a_glob_are_one_corpus(tmp_path: Path) -> None:
    texts = documents(90, 60000)
    for shard in range(3):
        built_by_megatron(tmp_path / f"web_{shard}", texts[30 * shard : 30 * shard + 30])
    corpus = open_corpus(f"{tmp_path}/web_*")
    assert corpus.read(0, len(corpus)).tolist() == np.concatenate(texts).tolist()
    ends = set(np.cumsum([len(text) for text in texts]).tolist())
    assert corpus.document_starts(0, len(corpus)).tolist() == sorted(ends - {0, len(corpus)})
    training, validation = split_corpus(corpus, 0.2, seed=0)
    assert validation is not None
    together = sorted(training.read(0, len(training)).tolist() + validation.read(0, len(validation)).tolist())
    assert together == sorted(np.concatenate(texts).tolist())
    (tmp_path / "web_1.idx").unlink()
    with pytest.raises(CorpusError, match=r"web_1: web_1.idx missing \(the other is there\).*copy the file again"):
        open_corpus(f"{tmp_path}/web_*")


def test_documents_beyond_the_groups_are_split_by_document_too(tmp_path: Path) -> None:
    """More documents than groups, and a share smaller than a group: groups are taken apart."""
    lengths = np.random.default_rng(0).integers(1, 9, 3 * GROUPS)
    starts = np.cumsum(lengths) - lengths
    corpus = Corpus.from_documents("text", np.arange(lengths.sum(), dtype=np.int32), lengths, "x")
    for fraction in (0.2, 0.0003):
        training, validation = split_corpus(corpus, fraction, seed=0)
        assert validation is not None
        held_out = validation.read(0, len(validation))
        target = fraction * len(corpus)
        assert target - 20 < len(held_out) <= target + 1
        both = np.concatenate([training.read(0, len(training)), held_out])
        assert (np.sort(both) == np.arange(len(corpus))).all()
        for part in (training, validation):  # documents stay whole
            tokens = part.read(0, len(part))
            begins = tokens[[0, *part.document_starts(0, len(part)).tolist()]]
            assert set(begins.tolist()) <= set(starts.tolist())
            assert sum(lengths[np.searchsorted(starts, begins)]) == len(part)


@given(
    st.lists(st.integers(0, 300), max_size=60), st.integers(0, 4), st.integers(-5, 20_000), st.integers(0, 2**32 - 1)
)
def test_search_finds_what_bisection_finds(runs: list[int], power: int, value: int, seed: int) -> None:
    """In arrays that grow evenly, in jumps, and hardly at all."""
    rng = np.random.default_rng(seed)
    steps = np.concatenate([np.zeros(0, np.int64), *(rng.integers(0, 2, run) * 7**power for run in runs)])
    array = np.cumsum(np.concatenate([np.full(900, seed % 2), steps, np.zeros(600, np.int64)]))
    found = rng.choice(array)
    for wanted in (value, int(found), int(found) + 1, int(array[0]), int(array[-1]), int(array[-1]) + 1):
        assert search_left(array, wanted) == bisect_left(array, wanted)


# --- bad files ---


def refused(prefix: Path, match: str, vocab_size: int | None = None) -> None:
    with pytest.raises(CorpusError, match=match):
        open_corpus(str(prefix), vocab_size)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return built_by_megatron(tmp_path / "web", [np.arange(30), np.arange(5), np.arange(7)])


def test_missing_files(tmp_path: Path, sound: Path) -> None:
    refused(tmp_path / "nowhere", r"nowhere.idx and nowhere.bin missing \(neither is there\)")
    refused(sound.with_suffix(".bin"), rf"web.bin.idx and web.bin.bin missing .*: write {sound}$")
    np.save(tmp_path / "bare.npy", np.arange(9))
    refused(tmp_path / "bare.npy", r"neither is there.*docs/data.md says how a file of bare tokens becomes a corpus")
    sound.with_suffix(".bin").unlink()
    refused(sound, r"web.bin missing \(the other is there\)")
    refused(Path("/"), r"data.blend: '/' is a folder; add the name of a corpus in it")
    refused(tmp_path / "no*", r"data.blend: no .bin or .idx matches '.*no\*'")


def test_the_pages_way_from_bare_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DATA_PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    texts = [[5, 6, 50256], [7, 50256], [8, 9]]
    np.array(sum(texts, []), np.uint16).tofile("train.bin")
    exec(program, {})
    corpus = open_indexed(tmp_path / "corpus", 50257)
    assert (corpus.tokens.tolist(), corpus.pointers.tolist()) == (sum(texts, []), [0, 2 * 3, 2 * 5])
    assert corpus.documents.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"tokens of uint32 cannot be written; give one of uint8, .*int32"):
        IndexedWriter(tmp_path / "other", np.dtype(np.uint32))


def test_a_fault_names_the_key_that_the_path_stands_under(tmp_path: Path, sound: Path) -> None:
    nothing = built_by_megatron(tmp_path / "empty", [])
    job = """
        model: {vocab_size: 99, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
                num_key_value_heads: 1}
        data: {source: indexed, blend: [{path: BLEND}], validation_paths: [HELD]}
        optimizer: {learning_rate: 0.1}
        training: {sequence_length: 4, global_batch_size: 1, max_steps: 1}
        """
    for blend, held, match in (
        (sound, tmp_path / "no*", "^data.validation_paths: no .bin"),
        (sound, nothing, "leave it out of data.validation_paths$"),
        (nothing, sound, "leave it out of data.blend$"),
    ):
        with pytest.raises(CorpusError, match=match):
            load_corpora(JobConfig.from_yaml(job.replace("BLEND", str(blend)).replace("HELD", str(held))))


@pytest.mark.parametrize("length", [0, 9, 83, 85, 90])
def test_a_token_file_of_another_length(sound: Path, length: int) -> None:
    data = sound.with_suffix(".bin").read_bytes()
    sound.with_suffix(".bin").write_bytes((data + data)[:length])
    how = "cut short" if length < 84 else "longer than its index says"
    refused(sound, f"web.bin: {how}, {length} bytes instead of the 84 of web.idx; copy both again")


@pytest.mark.parametrize(
    ("at", "format", "value", "match"),
    [
        (9, "<Q", 2, "an index of version 2, this program reads version 1; write the corpus again"),
        (0, "<9s", b"TNTIDX\0\0\0", "begins with b'TNTIDX.*no index of Megatron's mapped format"),
        (17, "<B", 7, r"tokens of type code 7, which is no integer type; readable are 1 \(uint8\), "),
        (17, "<B", 99, "tokens of type code 99"),
        (18, "<Q", 4, "102 bytes instead of 114 for 4 sequences and 3 documents"),
        (34 + 12, "<q", 2, "the first sequence begins at byte 2, not 0"),
        (34 + 12 + 8, "<q", 58, "sequence 1 begins at byte 58, but the one before it ends at 60"),
        (34 + 36 + 24, "<q", 2, "its documents are sequences 0 to 2, but there are 3"),
        (34 + 36 + 8, "<q", 5, "document 1 begins at sequence 5, but the next one at 2; write the corpus again"),
    ],
)
def test_a_bad_index(sound: Path, at: int, format: str, value: int, match: str) -> None:
    raw = bytearray(sound.with_suffix(".idx").read_bytes())
    struct.pack_into(format, raw, at, value)
    sound.with_suffix(".idx").write_bytes(raw)
    refused(sound, match)


@pytest.mark.parametrize("length", [0, 20, 60])
def test_an_index_cut_short(sound: Path, length: int) -> None:
    sound.with_suffix(".idx").write_bytes(sound.with_suffix(".idx").read_bytes()[:length])
    refused(sound, "web.idx: .*(begins with|cut short|instead of)")


def test_a_token_beyond_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [np.zeros(3000, np.int64), np.array([1, 29, 2])]
    prefix = built_by_megatron(tmp_path / "web", texts)
    refused(prefix, r"the token id 29 is beyond model.vocab_size \(29\); set model.vocab_size to at least 30", 29)
    negative = built_by_megatron(tmp_path / "negative", [np.array([3, -1])], np.int32)
    refused(negative, r"the token id -1 is beyond model.vocab_size \(29\); the file is damaged", 29)
    monkeypatch.setattr(indexed, "_BLOCKS", 1)  # what the sample does not show, reading does
    monkeypatch.setattr(indexed, "_BLOCK", 64)
    corpus = open_corpus(str(built_by_megatron(tmp_path / "late", [np.zeros(3000), np.array([29]), np.zeros(90)])), 29)
    assert corpus.read(0, 3000).max() == 0
    with pytest.raises(CorpusError, match=r"late, token 3,000: the token id 29 is beyond"):
        corpus.read(2990, 3010)
    summary = tmp_path / "late.summary.json"
    summary.write_text('{"tokens": 3090, "largest_token": 29}')  # of other tokens: not believed
    open_indexed(tmp_path / "late", 29)
    summary.write_text('{"tokens": 3091, "largest_token": 29}')
    refused(tmp_path / "late", r"the token id 29 is beyond model.vocab_size \(29\)", 29)


def test_tokens_take_two_bytes_as_long_as_their_ids_fit() -> None:
    assert [indexed.token_type(size).itemsize for size in (256, 65_536, 65_537)] == [2, 2, 4]


def test_an_empty_corpus(tmp_path: Path) -> None:
    refused(built_by_megatron(tmp_path / "web", []), "the corpus is empty: 1 shard, 0 tokens")


def test_opening_a_large_corpus_reads_little_of_it(tmp_path: Path) -> None:
    """A sparse one of 40 GB, more than fits: what is opened is sampled, what is read is mapped."""
    sequences, length = 10_000, 2_000_000
    with open(tmp_path / "huge.idx", "wb") as file:
        file.write(HEADER.pack(indexed.MAGIC, 1, 8, sequences, sequences + 1))
        file.write(np.full(sequences, length, "<i4").tobytes())
        file.write((np.arange(sequences) * length * 2).astype("<i8").tobytes())
        file.write(np.arange(sequences + 1).astype("<i8").tobytes())
    with open(tmp_path / "huge.bin", "wb") as tokens:
        tokens.truncate(sequences * length * 2)
    corpus = open_corpus(str(tmp_path / "huge"), 100)
    training, validation = split_corpus(corpus, 0.001, seed=0)
    assert validation is not None and len(validation) in range(7 * length, 11 * length, length)
    assert training.document_starts(5 * length - 3, 5 * length + 9).tolist() == [3]
