"""Preparing corpora: every kind of input gives the tokens that its library gives."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from launch import prepare_data
from launch.data import text_inputs
from launch.data.corpora import open_corpus
from tests.unit.prepared_texts import contents, expected, jsonl, prepare, texts, written

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "parquet.gz"])
def test_every_kind_gives_the_librarys_own_tokens(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    documents = [*texts(120), "", *texts(5, 1)]
    path = written(tmp_path, kind, documents)
    prepare(tokenizer, tmp_path / "out", path, options=("--field", "body") if kind.startswith("parquet") else ())
    assert contents(tmp_path / "out") == (expected(tokenizer, documents), sum(map(bool, documents)))
    left = sorted(item.name for item in tmp_path.glob("out*"))
    assert left == ["out.bin", "out.idx", "out.summary.json"]


def test_bytes_need_no_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    long = "".join(text + "\n" for text in texts(80))
    (tmp_path / "1.txt").write_text(long)
    (tmp_path / "2.jsonl").write_bytes(jsonl(texts(30, 1)))
    command = ["--input", "~/1.txt", "~/2.jsonl", "--tokenizer", "bytes", "--workers", "1", "--output", "~/out"]
    assert prepare_data.main([*command, "--end_of_document", "|"]) == 0
    documents = [long, *filter(None, texts(30, 1))]
    corpus = open_corpus(str(tmp_path / "out"), 256)
    assert bytes(corpus.read(0, len(corpus)).tolist()) == "".join(text + "|" for text in documents).encode()
    assert corpus.num_documents == len(documents) and corpus.shards[0].tokens.dtype == np.uint8
    assert prepare_data.main([*command[:-1], str(tmp_path / "new"), "--end_of_document", "<|end|>"]) == 1
    assert "'<|end|>' is no byte, and with the tokenizer bytes a token is one" in capsys.readouterr().err


def test_a_tokenizer_whose_ids_have_holes_gets_a_type_that_holds_them(tmp_path: Path) -> None:
    sparse = Tokenizer(models.WordLevel({"a": 3, "b": 70_000, "[?]": 0}, unk_token="[?]"))
    sparse.pre_tokenizer = pre_tokenizers.Whitespace()
    sparse.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("a b a")
    prepare(tmp_path / "tokenizer.json", tmp_path / "out", tmp_path / "in.txt")
    assert open_corpus(str(tmp_path / "out")).read(0, 3).tolist() == [3, 70_000, 3]


def test_each_plain_text_is_a_document_whatever_its_length(tmp_path: Path, tokenizer: Path) -> None:
    long = "".join(text + "\n" for text in texts(80))
    assert len(long.encode()) > 5 * text_inputs.BLOCK_BYTES
    for name, text in (("1.txt", "the cat"), ("2.txt", long), ("3.txt", ""), ("4.txt", "a mat\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "5.txt.gz").write_bytes(gzip.compress("naïve 猫".encode()))
    prepare(
        tokenizer, tmp_path / "out", f"{tmp_path}/*.txt", tmp_path / "5.txt.gz", options=("--end_of_document", "[END]")
    )
    corpus = open_corpus(str(tmp_path / "out"))
    tokens = corpus.read(0, len(corpus))
    starts = corpus.document_starts(0, len(corpus))
    assert (tokens == 0).sum() == (tokens == 1).sum() == 4  # one [BOS] and one [END] for each, and none between blocks
    assert starts.tolist() == np.flatnonzero(tokens == 0)[1:].tolist()
    made = Tokenizer.from_file(str(tokenizer))
    parts = [made.decode(part.tolist()) for part in np.split(tokens, starts)]
    assert parts == ["the cat", long, "a mat\n", "naïve 猫"]
