"""Ranks that are stopped, stuck or late: who notices, whom they name, and that nobody is named who is merely slow."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from launch.hang_report import Member
from launch.health_folder import HealthFolder
from launch.pace import STEP, Limits, Pace
from launch.watchdog import Patience, Watchdog
from tests.distributed.harness import run_distributed

WORLD = 4
PATIENCE = Patience(tick=0.1, hear=0.3, answer=2.0, grace=0.0, silence=1.0)
LIMIT = 1.0


class Case:
    """A few quick steps, and then one in which some rank misbehaves until the others have found out."""

    def __init__(self, folder: str, name: str) -> None:
        self.rank = dist.get_rank()
        self.folder = HealthFolder(Path(folder), name)
        self.members: list[Member] = [Member(0, "", 0)] * WORLD
        dist.all_gather_object(self.members, Member(self.rank, f"host-{self.rank}", os.getpid()))
        self.pace = Pace(Limits(10.0, LIMIT, 60.0))
        dist.barrier()
        self.watchdog = Watchdog(self.folder, self.pace, self.rank, self.members, PATIENCE, stops=False)
        for step in range(1, 8):
            self.step(step)

    def step(self, number: int, before: Callable[[], object] = lambda: None) -> None:
        self.pace.begin(STEP, number)
        before()
        dist.all_reduce(torch.ones(1))

    def verdict(self, spokesman: int) -> str:
        deadline = time.monotonic() + 20
        while (text := self.folder.verdict(spokesman)) is None:
            assert time.monotonic() < deadline, self.folder.alarm()
            time.sleep(0.05)
        return text

    def close(self) -> str:
        """What was told, the same on all ranks."""
        dist.barrier()
        self.watchdog.close()
        return "".join(path.read_text() for path in self.folder.told())


def late_but_not_too_late(folder: str) -> str:
    case = Case(folder, "late")
    for step in (8, 9):
        case.step(step, lambda: time.sleep(LIMIT / 2 if case.rank == 1 else 0))
    return case.close()


def rank_zero_stopped(folder: str) -> str:
    """Rank 3 lets it go on once the others have spoken."""
    case = Case(folder, "stopped")

    def misbehave() -> None:
        if case.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if case.rank == 3:
            case.verdict(1)
            os.kill(case.members[0].pid, signal.SIGCONT)

    case.step(8, misbehave)
    return case.close()


def reads_for_ever(folder: str) -> str:
    case = Case(folder, "reads")
    case.step(8, lambda: case.verdict(0) if case.rank == 2 else None)
    return case.close()


def holds_the_lock(folder: str) -> str:
    """A call into C that keeps Python's lock, so that no thread of the rank can answer."""
    case = Case(folder, "lock")
    case.step(8, lambda: ctypes.PyDLL(None).sleep(6) if case.rank == 1 else None)
    case.verdict(0)
    return case.close()


def cases(folder: str) -> list[str]:
    return [case(folder) for case in (late_but_not_too_late, rank_zero_stopped, reads_for_ever, holds_the_lock)]


def test_the_missing_rank_is_named(tmp_path: Path) -> None:
    told = run_distributed(cases, WORLD, str(tmp_path))
    late, stopped, reads, lock = told[0]
    assert told == [told[0]] * WORLD
    assert late == ""
    assert "missing: rank 0 on host-0, which does not answer" in stopped
    assert "ranks 1-2 on host-1, host-2, waiting in all_reduce, called at" not in reads
    assert "ranks 1-2 on host-1, host-2, waiting in all_reduce" in stopped and "rank 3 on host-3" in stopped
    assert "missing: rank 2 on host-2, which is in no collective; step 8, for " in reads
    assert "ranks 0-1, 3 on host-0, host-1, host-3, waiting in all_reduce" in reads
    assert "test_watchdog.py" in reads.partition("rank 2 on host-2:")[2]  # where it is instead
    assert "missing: rank 1 on host-1, which does not answer" in lock and "holds_the_lock" in lock
    assert all(f"step 8 takes longer than {LIMIT:.0f} s: health.minimum_step_seconds" in one for one in told[0][1:])
    assert HealthFolder(tmp_path, "reads").suspects() == ["host-2"]
