"""One run directory has one job: who is told of a busy run, and of a directory that cannot be written or locked."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run_lock import RunBusy, RunDirectoryError, lock_run

ROOT = Path(__file__).resolve().parents[2]


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from launch.run_lock import lock_run; f = lock_run(Path({str(tmp_path)!r})); "
    code += "print('locked', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(RunBusy, match=rf"in use by .*process {holder.pid} on "):
        lock_run(tmp_path, patience=0.1)
    holder.kill()
    holder.wait()
    held = lock_run(tmp_path, patience=5)
    assert held is not None and f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    held.close()


@pytest.mark.parametrize("place", ["file", "file/run", "locked"])
def test_a_run_directory_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked" / "lock").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=rf"{place} cannot be written \(.*give job.run_directory another place"):
        lock_run(tmp_path / place)


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
