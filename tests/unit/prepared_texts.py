"""What the tests of text inputs and of prepared corpora share: texts, files of them, a tokenizer, and the command."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from launch import prepare_data
from launch.data import text_inputs
from launch.data.corpora import open_corpus

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "where",
    "über",
    "猫",
    "naïve",
    "🐈",
    "slept",
    "soundly",
    "till",
    "noon",
]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) + "\n" * rng.randrange(3) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes merged into 400 tokens; [BOS] before each text by the tokenizer's own post-processor."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[BOS]", "[END]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts(300), trainer)
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few texts each."""
    monkeypatch.setattr(text_inputs, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(text_inputs, "PARQUET_ROWS", 7)


def prepare(tokenizer: Path, output: Path, *inputs: Path | str, status: int = 0, options: tuple[str, ...] = ()) -> None:
    arguments = ["--input", *map(str, inputs), "--tokenizer", str(tokenizer), "--output", str(output)]
    assert prepare_data.main([*arguments, "--workers", "1", *options]) == status


def expected(tokenizer: Path, documents: list[str]) -> list[int]:
    """By the tokenizers library, one text at a time."""
    made = Tokenizer.from_file(str(tokenizer))
    return [token for text in documents if text for token in made.encode(text).ids]


def contents(prefix: Path) -> tuple[list[int], int]:
    corpus = open_corpus(str(prefix), 400)
    return corpus.read(0, len(corpus)).tolist(), corpus.num_documents


def jsonl(documents: list[str], name: str = "text") -> bytes:
    return b"".join(json.dumps({name: text, "id": i}).encode() + b"\n" for i, text in enumerate(documents))


def written(folder: Path, kind: str, documents: list[str]) -> Path:
    """The documents in a file of this kind."""
    path = folder / f"in.{kind}"
    name = "body" if kind.startswith("parquet") else "text"
    if kind.startswith("parquet"):
        pq.write_table(pa.table({"id": range(len(documents)), name: documents}), path, row_group_size=20)
        data = path.read_bytes()
    else:
        data = jsonl(documents, name)
    if kind.endswith(".gz"):
        data = gzip.compress(data[:100]) + gzip.compress(data[100:])  # two members, as `cat a.gz b.gz` makes
    elif kind.endswith(".zst"):
        data = zstandard.compress(data[:100]) + zstandard.compress(data[100:])
    path.write_bytes(data)
    return path
