"""What Linux says about other processes of this node, and about a parent's death."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk, a file server or a driver",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead, its parent has not asked",
    "I": "idle",
}
"""proc(5)."""


@dataclass(frozen=True)
class Child:
    """A process that some other one started and has not yet asked about."""

    pid: int
    alive: bool
    status: int
    """How a dead one ended, as its parent will read it: positive an exit status, negative a signal."""
    environment: dict[str, str]
    """Empty for a dead or dying one."""


def children(pid: int) -> Iterator[Child]:
    """The children of process `pid`; none if it is gone."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, listed):
        try:
            fields = _stat(child)
        except OSError:  # gone meanwhile
            continue
        alive = fields[0] not in "ZX"
        pairs: list[bytes] = []
        if alive:
            with suppress(OSError):  # dying meanwhile: not gone, and its status is to be asked for next time
                pairs = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        environment = dict(pair.decode(errors="replace").partition("=")[::2] for pair in pairs if pair)
        yield Child(child, alive, os.waitstatus_to_exitcode(int(fields[-1])), environment)


def _stat(pid: int) -> list[str]:
    """The fields behind the name, which is in parentheses and may contain anything. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def process_state(pid: int) -> str:
    """What process `pid` of this node is doing, for a person: its state, and where in the kernel it sleeps."""
    try:
        letter = _stat(pid)[0]
    except OSError:
        return "it is gone"
    try:
        channel = Path(f"/proc/{pid}/wchan").read_text().strip()
    except OSError:  # only for its owner
        channel = ""
    sleeps = f", in {channel}" if channel not in ("", "0") else ""
    return f"state {letter} ({_STATES.get(letter, 'unknown')}){sleeps}"


def local_rank(child: Child) -> str | None:
    """What a launcher, or srun where it is the launcher, has told a child; None for one that is no rank."""
    return child.environment.get("LOCAL_RANK") or child.environment.get("SLURM_LOCALID")


def ranks_beside(launcher: int) -> dict[int, str]:
    """Rank -> state of the ranks that a launcher (or srun's daemon) has started."""
    found = {}
    for child in children(launcher):
        rank = child.environment.get("RANK") or child.environment.get("SLURM_PROCID")
        if rank is not None:
            found[int(rank)] = process_state(child.pid)
    return found


def die_with_parent() -> None:
    """From now on the kernel kills this process when the one that started it ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
