"""One run directory has one job: who is told of a busy run, and of a directory that cannot be written or locked."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest

from launch.run_lock import RunDirectoryError, lock_run

ROOT = Path(__file__).resolve().parents[2]


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from launch.run_lock import lock_run; f = lock_run(Path({str(tmp_path)!r})); "
    code += "print('locked', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(RunDirectoryError, match=rf"in use by .*process {holder.pid} on "):
        lock_run(tmp_path, patience=0.1)
    threading.Timer(0.3, holder.kill).start()
    held = lock_run(tmp_path, patience=600)  # it is let go meanwhile
    holder.wait()
    assert held is not None
    assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    held.close()


def test_a_run_directory_is_made(tmp_path: Path) -> None:
    for _ in range(2):
        held = lock_run(tmp_path / "runs" / "first")
        assert held is not None
        held.close()


@pytest.mark.parametrize("place", ["file", "file/run", "locked"])
def test_a_run_directory_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked" / "lock").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=rf"{place} cannot be written \(.*give job.run_directory another place"):
        lock_run(tmp_path / place)


def test_a_disk_that_fails_under_the_lock(tmp_path: Path) -> None:
    failing = patch("launch.run_lock.fcntl.lockf", side_effect=OSError(errno.EIO, "Input/output error"))
    with failing, pytest.raises(RunDirectoryError, match=r"cannot be written \(\[Errno 5\] Input/output error\)"):
        lock_run(tmp_path)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("launch.run_lock.fcntl.lockf", refuse)
    assert lock_run(tmp_path) is None
    assert (
        f"{tmp_path} is on a file system without locks (No locks available): start no second job"
        in capsys.readouterr().out
    )
