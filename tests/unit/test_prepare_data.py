"""Preparing corpora: every kind of input, bad records, kills, and the same bytes whatever happens on the way."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from launch import prepare_data
from launch.data import text_inputs
from launch.data.corpora import open_corpus
from launch.data.indexed_writer import IndexedWriter
from launch.data.text_inputs import BadInput, Block, Start, blocks
from launch.data.text_tokens import TokenisingProcesses

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_rows_of_parquet_are_parted_by_their_bytes(tmp_path: Path) -> None:
    """Whatever a row holds, a block holds little more than one block's bytes, and reading can start at each."""
    rows = ["a" * size if size % 3 else None for size in (1, 3000, 10, 0, 2500, 700, 800, 600, 5, 2000, 4000, 2)]
    pq.write_table(pa.table({"body": pa.array(rows, pa.string())}), tmp_path / "in.parquet", row_group_size=9)
    found = list(blocks(tmp_path / "in.parquet", "body"))
    assert [text for block in found for text in block.content] == [row and row.encode() for row in rows]
    assert len(found) > 5
    for block in found:
        assert sum(len(text or "") for text in block.content[:-1]) < text_inputs.BLOCK_BYTES  # type: ignore[misc]


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


def test_a_line_longer_than_a_block_is_not_cut_inside_a_character(tmp_path: Path, tokenizer: Path) -> None:
    for shift in range(4):
        text = "a" * shift + "猫🐈" * 3000
        (tmp_path / "long.txt").write_text(text)
        pieces = [block.content for block in blocks(tmp_path / "long.txt", "text")]
        assert b"".join(pieces).decode() == text and len(pieces) > 3  # type: ignore[arg-type]
        assert all(piece.decode() for piece in pieces)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_reading_goes_on_at_any_block(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "in.txt"
    if kind == "txt":
        path.write_text("".join(texts(90)) + "猫" * 5000)
    else:
        path = written(tmp_path, kind, texts(90))

    def told(found: list[Block]) -> list[tuple]:
        return [(one.content, one.start, one.following, one.first, one.last) for one in found]

    whole = list(blocks(path, "body" if kind == "parquet" else "text"))
    assert len(whole) > 4
    for index, block in enumerate(whole):
        rest = blocks(path, "body" if kind == "parquet" else "text", block.start)
        assert told(list(rest)) == told(whole[index:])


def test_bad_records_are_counted_listed_and_left_out(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = texts(60)
    lines = jsonl(good).splitlines(keepends=True)
    bad = {
        3: (b'{"text": "unfinished\n', "JSONDecodeError"),
        9: (b'{"body": "elsewhere"}\n', "no field text; there are body"),
        20: (b'{"text": 7}\n', "text is 7, not text"),
        21: (b'{"text": null}\n', "text is null, not text"),
        40: (b'["text"]\n', "a list, not an object"),
        41: (b'{"text": "\xff"}\n', "UnicodeDecodeError"),
        50: (b'{"text": "\\ud800"}\n', "UnicodeEncodeError"),
        51: (b"[" * 100_000 + b"\n", "RecursionError"),
    }
    for at, (line, _) in bad.items():
        lines.insert(at - 1, line)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(line.rstrip(b"\n") for line in lines))  # no newline at the end
    whole = jsonl(good)
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(whole)[:-40])
    (tmp_path / "binary.txt").write_bytes(b"text\0text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "named.jsonl.zst").write_bytes(whole)
    (tmp_path / "cut.zst").write_bytes(zstandard.compress(b"a cat" * 1000)[:-9])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    rows = [b"a dog", None, b"\xff\xfe", "a c\u00e4t".encode()]
    table = pa.table({"text": pa.array(rows, pa.binary()).view(pa.string())})  # says that it is text, and is not
    pq.write_table(table, tmp_path / "latin.parquet")
    names = [
        "in.jsonl",
        "short.jsonl.gz",
        "binary.txt",
        "latin.txt",
        "named.jsonl.zst",
        "cut.zst",
        "cut.parquet",
        "latin.parquet",
    ]
    inputs = [tmp_path / name for name in names]
    prepare(tokenizer, tmp_path / "out", *inputs)
    listed = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert f"{len(listed)} bad records were left out" in capsys.readouterr().out
    first = [entry for entry in listed if entry["file"].endswith("/in.jsonl")]
    assert [entry["record"] for entry in first] == list(bad)
    for entry, (_, reason) in zip(first, bad.values(), strict=True):
        assert reason in entry["reason"]
    others = {Path(entry["file"]).name: entry for entry in listed[len(first) :]}
    assert others["short.jsonl.gz"]["reason"].startswith("EOFError")
    assert "NUL at byte 4" in others["binary.txt"]["reason"] and "not UTF-8" in others["latin.txt"]["reason"]
    assert "named .zst, but begins with" in others["named.jsonl.zst"]["reason"]
    assert (
        "ends inside a zstd frame" in others["cut.zst"]["reason"] and "ArrowInvalid" in others["cut.parquet"]["reason"]
    )
    assert [(entry["record"], entry["reason"].split(":")[0]) for entry in listed[-2:]] == [
        (2, "text is null, not text"),
        (3, "UnicodeDecodeError"),
    ]
    tokens, count = contents(tmp_path / "out")
    readable = others["short.jsonl.gz"]["record"] - 1  # the whole lines before the end are kept
    assert 40 < readable < 60 and count == len(good) + readable + 2
    assert tokens == expected(tokenizer, [*good, *good[:readable], "a dog", "a c\u00e4t"])


def test_strict_stops_at_the_first_bad_record(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts(20)) + b"{\n" + jsonl(texts(5)))
    prepare(tokenizer, tmp_path / "out", tmp_path / "in.jsonl", status=1, options=("--strict",))
    assert "in.jsonl, record 21: JSONDecodeError: " in capsys.readouterr().err
    assert not (tmp_path / "out.idx").exists()
    prepare(tokenizer, tmp_path / "out", tmp_path / "in.jsonl")
    assert contents(tmp_path / "out") == (expected(tokenizer, texts(20) + texts(5)), 25)


def test_inputs_without_a_document_are_refused_and_the_mended_command_works(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in[1].jsonl").write_bytes(jsonl(texts(3)))  # a name, though a glob of in1.jsonl too
    prepare(tokenizer, tmp_path / "out", tmp_path / "in[1].jsonl", status=1, options=("--field", "body"))
    assert (
        "out: no document in 1 file: 3 records are bad and the rest empty" in (said := capsys.readouterr().err)
        and "out.rejected.jsonl says why); correct --input, or --field (body)" in said
    )
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.lock", "out.rejected.jsonl"]
    prepare(tokenizer, tmp_path / "out", tmp_path / "in[1].jsonl")
    assert contents(tmp_path / "out") == (expected(tokenizer, texts(3)), 3)
    (tmp_path / "new.state.json.partial").write_text("{")
    prepare(tokenizer, tmp_path / "new", tmp_path / "in[1].jsonl", status=1)
    assert "new.state.json.partial: is damaged (" in capsys.readouterr().err


def test_what_is_complete_is_left_alone_and_what_differs_is_refused(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts(20)))
    prepare(tokenizer, tmp_path / "out", tmp_path / "in.jsonl")
    prepare(tokenizer, tmp_path / "out", tmp_path / "in.jsonl")
    assert "complete already" in capsys.readouterr().out
    prepare(tokenizer, tmp_path / "out", tmp_path / "in.jsonl", status=1, options=("--field", "body"))
    assert "out: there is a corpus of other inputs; remove it or give another --output" in capsys.readouterr().err
    for arguments, match in (
        (["--input", f"{tmp_path}/*.md"], "no file matches"),
        (
            ["--input", f"{tmp_path}/in.jsonl", "--end_of_document", "[NONE]"],
            "'[NONE]' is none of the tokenizer's ",
        ),
    ):
        assert prepare_data.main([*arguments, "--tokenizer", str(tokenizer), "--output", f"{tmp_path}/new"]) == 1
        assert match in capsys.readouterr().err


_SMALL = """
import itertools, os, signal, sys
from launch import prepare_data
from launch.data import text_inputs
text_inputs.BLOCK_BYTES, text_inputs.PARQUET_ROWS, prepare_data._SAVE_SECONDS = 2000, 7, 0.0
saves, save = itertools.count(1), prepare_data.Preparation._save

def save_and_pause(*arguments):
    save(*arguments)
    if str(next(saves)) == os.environ.get("PAUSE_AFTER"):
        os.kill(os.getpid(), signal.SIGSTOP)

prepare_data.Preparation._save = save_and_pause
sys.exit(prepare_data.main(sys.argv[1:]))
"""


def test_killed_at_random_moments_the_output_is_the_same_byte_for_byte(tmp_path: Path, tokenizer: Path) -> None:
    """Each a little after one more save than the one before; the first right there, before there can be more."""
    for kind in ("jsonl.zst", "parquet"):
        written(tmp_path, kind, texts(700, 2))
    (tmp_path / "z.txt").write_text("".join(texts(300, 3)))
    (tmp_path / "bad.jsonl").write_bytes(b"{\n" + jsonl(texts(200, 4)) + b"7\n")
    inputs = [tmp_path / "in.jsonl.zst", tmp_path / "bad.jsonl", tmp_path / "z.txt", tmp_path / "in.parquet"]
    prepare(tokenizer, tmp_path / "calm", *inputs, options=("--workers", "2"))
    command = [sys.executable, "-c", _SMALL, "--input", *map(str, inputs), "--tokenizer", str(tokenizer)]
    command += ["--output", str(tmp_path / "killed"), "--workers", "1"]
    state, rng, places = tmp_path / "killed.state.json.partial", random.Random(0), []
    for kill in range(4):
        pause = os.environ | {"PAUSE_AFTER": str(kill + 2)}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0, env=pause
        )
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if kill:
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(rng.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == 0 or (tmp_path / "killed.idx").exists():  # its last act: the output is whole
            break
        assert process.returncode == -signal.SIGKILL
        places.append(state.read_text())
    assert places and len(set(places)) == len(places)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert "going on after" in ended.stdout or "complete already" in ended.stdout
    for suffix in ("bin", "idx", "summary.json", "rejected.jsonl"):
        assert (tmp_path / f"killed.{suffix}").read_bytes() == (tmp_path / f"calm.{suffix}").read_bytes(), suffix
    left = sorted(path.name for path in tmp_path.glob("killed*"))
    assert left == ["killed.bin", "killed.idx", "killed.rejected.jsonl", "killed.summary.json"]


def test_what_was_written_after_the_last_save_is_made_again(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = jsonl(texts(400)).splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_bytes(b"".join(line + b"{\n" for line in lines))  # every block has bad records
    prepare(tokenizer, tmp_path / "calm", tmp_path / "in.jsonl")
    save, write, saves, writes = prepare_data.Preparation._save, IndexedWriter.write, iter([1, 2]), iter(range(9))

    def save_twice(self: prepare_data.Preparation, *arguments: Any) -> None:
        if next(saves, None):
            save(self, *arguments)

    def write_some(self: IndexedWriter, *arguments: Any, **options: Any) -> None:
        if next(writes, None) is None:
            raise OSError("No space left on device")
        write(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "_SAVE_SECONDS", 0.0)
        patch.setattr(prepare_data.Preparation, "_save", save_twice)
        patch.setattr(IndexedWriter, "write", write_some)
        prepare(tokenizer, tmp_path / "full", tmp_path / "in.jsonl", status=1)
    saved = json.loads((tmp_path / "full.state.json.partial").read_text())
    assert saved["rejected_bytes"] < (tmp_path / "full.rejected.jsonl").stat().st_size
    assert 0 < saved["writer"]["tokens"] * 2 < (tmp_path / "full.bin.partial").stat().st_size
    prepare(tokenizer, tmp_path / "full", tmp_path / "in.jsonl")
    for suffix in ("bin", "idx", "summary.json", "rejected.jsonl"):
        assert (tmp_path / f"full.{suffix}").read_bytes() == (tmp_path / f"calm.{suffix}").read_bytes(), suffix


def test_a_text_that_breaks_off_in_its_second_reading_ends_the_command_which_goes_on_later(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text is read once to see that it is one, and once for its tokens; there a file server may fail."""
    long = "".join(text + "\n" for text in texts(80))
    (tmp_path / "1.txt").write_text(long)
    (tmp_path / "2.txt").write_text("a mat")
    prepare(tokenizer, tmp_path / "calm", tmp_path / "1.txt", tmp_path / "2.txt")

    def three_blocks(path: Path, *arguments: Any) -> Iterator[Block]:
        for number, block in enumerate(blocks(path, *arguments)):
            if number == 3:
                raise BadInput("OSError: [Errno 116] Stale file handle")
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "_SAVE_SECONDS", 0.0)
        patch.setattr(prepare_data, "blocks", three_blocks)
        prepare(tokenizer, tmp_path / "out", tmp_path / "1.txt", tmp_path / "2.txt", status=1)
    said = capsys.readouterr().err
    assert "1.txt: whole when it was looked through, but broke off after " in said and "Stale file handle" in said
    assert "the same command goes on from there" in said
    prepare(tokenizer, tmp_path / "out", tmp_path / "1.txt", tmp_path / "2.txt")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"calm.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("kind", "change"), [("txt", "is another"), ("txt.gz", "is cut"), ("jsonl", "grows"), ("jsonl", "is gone")]
)
def test_an_input_that_changes_while_it_is_read_ends_the_command_which_begins_again(
    kind: str,
    change: str,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What had been read would be half of one version and half of another, and nothing would tell."""
    path, pack = tmp_path / f"in.{kind}", gzip.compress if kind.endswith("gz") else bytes
    encode = jsonl if kind == "jsonl" else lambda documents: "".join(text + "\n" for text in documents).encode()
    first, second = pack(encode(texts(80))), pack(encode(texts(80, 1)))
    path.write_bytes(first)

    def changed(file: Path, *arguments: Any) -> Iterator[Block]:
        for number, block in enumerate(blocks(file, *arguments)):
            if number == 1 and change == "is gone":
                file.unlink()
            elif number == 1:
                file.write_bytes(
                    {"grows": first + second, "is cut": first[:3000], "is another": b"\xff" * 9000}[change]
                )
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "_SAVE_SECONDS", 0.0)
        patch.setattr(prepare_data, "blocks", changed)
        prepare(tokenizer, tmp_path / "out", path, status=1)
    assert f"in.{kind}: changed while it was read" in capsys.readouterr().err
    path.write_bytes(second)
    prepare(tokenizer, tmp_path / "out", path)
    prepare(tokenizer, tmp_path / "calm", path)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"calm.{suffix}").read_bytes()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match="ArrowInvalid"):
        list(blocks(tmp_path / "in.parquet", "text"))
    pq.write_table(pa.table({"id": [1], "text": [7]}), tmp_path / "in.parquet")
    with pytest.raises(BadInput, match="column 'text' holds int64, not text"):
        list(blocks(tmp_path / "in.parquet", "text"))
    with pytest.raises(BadInput, match="has no column 'body'; its columns are id, text"):
        list(blocks(tmp_path / "in.parquet", "body"))


def test_no_more_is_read_than_the_processes_can_hold(tokenizer: Path) -> None:
    """Of an input without an end; this bounds the memory."""
    read = 0

    def endless() -> Iterator[tuple[int, Block]]:
        nonlocal read
        while True:
            read += 1
            yield read, Block("text", b"the cat", Start(), Start(), True, True)

    with TokenisingProcesses(2, str(tokenizer), "text", None) as processes:
        results = processes.map(endless())
        for number in range(1, 100):
            assert next(results)[0] == number
            assert read <= number + 2 * TokenisingProcesses.DEPTH


def test_a_tokenising_process_that_dies_is_told(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts(500)))
    with TokenisingProcesses(1, str(tokenizer), "text", None) as processes:
        results = processes.map((None, block) for block in blocks(tmp_path / "in.jsonl", "text"))
        next(results)
        processes._processes[0].kill()
        with pytest.raises(
            RuntimeError, match="a tokenising process ended with status -9; where memory ran out, lower"
        ):
            list(results)
