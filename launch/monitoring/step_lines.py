"""A file of JSON lines, one for each step: appended while the run goes, cut back at a resume."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class StepLines:
    """Floats are written by repr, which reads back bit for bit; nan and infinities as the strings repr gives."""

    def __init__(self, path: Path, resumed_from: int | None) -> None:
        """Drops entries later than step `resumed_from`, all of them when it is None, and a line that a kill cut short.

        The shortened file replaces the old one atomically.
        """
        kept = [] if resumed_from is None else [line for line in _lines(path) if _step(line) <= resumed_from]
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, entry: Mapping[str, float | int]) -> None:
        safe = {key: value if math.isfinite(value) else repr(value) for key, value in entry.items()}
        line = (json.dumps(safe) + "\n").encode()
        if self._file.write(line) != len(line):  # unbuffered: a full disk may take part of it in silence
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _step(line: str) -> float:
    """The entry's step; infinity, hence later than anything, for a line that is not whole."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
