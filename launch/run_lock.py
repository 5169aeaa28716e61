"""Allows one job in a run directory: two would mix their checkpoints and metrics."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from launch.standard_output import say

LOCK = "lock"
_PATIENCE = 10.0
"""Seconds in which a run that is just ending may let go."""


class RunDirectoryError(ValueError):
    """A run directory that cannot be written, or that another process has."""


@contextmanager
def writing_into(run: Path) -> Iterator[None]:
    """Around what a run cannot do without. Raises RunDirectoryError in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {run} cannot be written ({error}); mend that, or give job.run_directory another place"
        ) from error


def lock_run(run: Path, patience: float = _PATIENCE) -> BinaryIO | None:
    """Takes the directory, made if needed, for as long as the returned file is open, or this process lives.

    None where the file system has no locks, with a warning. Raises RunDirectoryError; where another process has it,
    naming that, after `patience` seconds.
    """
    with writing_into(run):
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "a+b")  # noqa: SIM115 (open while locked)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    file.close()
                    why = error.strerror
                    say(f"warning: {run} is on a file system without locks ({why}): start no second job in it")
                    return None
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                file.close()
                raise RunDirectoryError(
                    f"run directory {run} is in use by {holder}; wait for it or end it, or give this run another "
                    "job.name"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(_holder().encode())
        file.flush()
        return file


def _holder() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"{f'job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}"
