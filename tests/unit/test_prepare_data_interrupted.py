"""Preparing corpora that is interrupted by kills, full disks, inputs that change and processes that die: the same bytes
come of it, or it is told."""

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

import pytest

from launch import prepare_data
from launch.data import input_files
from launch.data.indexed_writer import IndexedWriter
from launch.data.text_inputs import BadInput, Block, Start, blocks
from launch.data.text_tokens import TokenisingProcesses
from tests.unit.prepared_texts import jsonl, prepare, texts, written

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("small_blocks")


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
        patch.setattr(input_files, "blocks", three_blocks)
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
        patch.setattr(input_files, "blocks", changed)
        prepare(tokenizer, tmp_path / "out", path, status=1)
    assert f"in.{kind}: changed while it was read" in capsys.readouterr().err
    path.write_bytes(second)
    prepare(tokenizer, tmp_path / "out", path)
    prepare(tokenizer, tmp_path / "calm", path)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"calm.{suffix}").read_bytes()


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
