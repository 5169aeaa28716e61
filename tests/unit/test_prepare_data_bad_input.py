"""Preparing corpora: records and inputs that are bad, and commands that are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from launch import prepare_data
from tests.unit.prepared_texts import contents, expected, jsonl, prepare, texts

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_bad_records_are_counted_listed_and_left_out(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = texts(60)
    lines = jsonl(good).splitlines(keepends=True)
    bad = {
        3: (b'{"text": "unfinished\n', "JSONDecodeError"),
        9: (b'{"body": "elsewhere"}\n', "no field text; its fields are body"),
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
    said = capsys.readouterr().out
    assert f"{len(listed)} bad records were left out, as listed in {tmp_path}/out.rejected.jsonl" in said
    assert f"; the first: {tmp_path}/in.jsonl, record 3, JSONDecodeError: " in said
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
        and "out.rejected.jsonl says why; the first: " in said
        and "record 1, no field body; its fields are text, id); correct --input, or --field (body)" in said
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
    said = capsys.readouterr().err
    assert "out: there is a corpus of other inputs, tokenizer or fields; remove out.bin and out.idx, or give" in said
    for arguments, match in (
        (["--input", f"{tmp_path}/*.md"], "no file matches"),
        (["--input", f"{tmp_path}"], f"'{tmp_path}' is a folder; name the files in it, such as '{tmp_path}/**/*.txt'"),
        (
            ["--input", f"{tmp_path}/in.jsonl", "--end_of_document", "[NONE]"],
            "'[NONE]' is none of the tokenizer's ",
        ),
    ):
        assert prepare_data.main([*arguments, "--tokenizer", str(tokenizer), "--output", f"{tmp_path}/new"]) == 1
        assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--output", "", "--output (.) is a folder; add the name"),
        ("--output", "/", "--output (/) is a folder; add the name"),
        ("--workers", "0", "--workers (0) must be at least 1"),
        ("--workers", "100000", "--workers (100000) must be at least 1 and, on this machine, at most "),
    ],
)
def test_commands_that_would_end_badly_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, complaint: str
) -> None:
    (tmp_path / "in.txt").write_text("text")
    command = ["--input", str(tmp_path / "in.txt"), "--tokenizer", "bytes", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        prepare_data.main([*command, option, value])
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
