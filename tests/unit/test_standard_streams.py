"""Standard streams as bad machines leave them: closed, into a full disk, or into a pipe that nobody reads."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import audit_data, convert, generate, prepare_data, rollback, run_eval, schema_docs, status, submit, train
from launch.exit_status import OUTPUT_LOST
from launch.standard_output import output_matters, say

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import os, sys
from launch.environment import end_process, place_in_world
place_in_world()
print("said")
with open(os.devnull) as file:
    print(file.fileno() > 2, sys.stdin.read() == "", file=sys.stderr)
end_process(3)
"""
LOST = "error: standard output cannot be written ([Errno 28] No space left on device); "
MAINS = [module.main for module in (audit_data, convert, generate, prepare_data, rollback, run_eval, status, submit)]
COMMANDS: list[Callable[[], int]] = [
    *(lambda main=main: main(["--help"]) for main in MAINS),
    lambda: train.main(["--check"]),
    schema_docs.main,
]


def test_closed_and_full_streams_end_no_run() -> None:
    """The first file that is opened afterwards is in no stream's place, where prints would land in it."""
    for streams, said in (("<&- >&-", "True True\n"), ("</dev/null >/dev/full", "True True\n")):
        command = ["bash", "-c", f'PYTHONUNBUFFERED= exec "$0" -c "$1" {streams}', sys.executable, CODE]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (3, said)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("buffering", [1, -1], ids=["line by line", "at the end"])
def test_a_full_disk_under_what_a_command_prints_is_one_line_and_a_status(
    command: Callable[[], int], buffering: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command() == OUTPUT_LOST
    said = capfd.readouterr()
    assert said.err.startswith(LOST) and said.err.count("\n") == 1 and said.out == ""


def test_ctrl_c_ends_a_command_without_a_traceback_once_it_has_cleared_up() -> None:
    code = """
import os, signal
from launch.standard_output import output_matters
@output_matters
def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.write(1, b"cleared up")
command()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "cleared up", "")


def test_what_a_command_reads_itself_may_fail_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # closed from the start

    @output_matters
    def command() -> int:
        print("nowhere")
        raise OSError("a file")

    with pytest.raises(OSError, match="a file"):
        command()


def test_a_command_leaves_nothing_for_the_end_of_the_interpreter_to_complain_of() -> None:
    """A full disk, and a reader that left, as under `| head -0`. Sockets of this process keep their broken pipes."""
    command, outside = [sys.executable, "-m", "launch.schema_docs"], os.environ | {"PYTHONUNBUFFERED": ""}
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, os.fdopen(write, "w") as nobody:
        ends = [
            subprocess.run(command, cwd=ROOT, env=outside, stdout=stdout, stderr=subprocess.PIPE, text=True)
            for stdout in (full, nobody)
        ]
    assert [ended.returncode for ended in ends] == [OUTPUT_LOST, -signal.SIGPIPE]
    assert ends[0].stderr.startswith(LOST) and ends[0].stderr.count("\n") == 1 and ends[1].stderr == ""


def test_a_full_disk_under_the_log_ends_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("to a reader")
    with open(tmp_path / "log", "w") as log:
        say("at once", log)
        assert (tmp_path / "log").read_text() == "at once\n"
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        say("to nobody", full)
        monkeypatch.setattr(sys, "stdout", full)
        say("to nobody")
    monkeypatch.undo()
    assert capsys.readouterr().out == "to a reader\n"
