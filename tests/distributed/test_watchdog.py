"""Ranks that are stopped, stuck or late: who notices, whom they name, and that nobody is named who is merely slow."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from launch.exit_status import HUNG
from launch.health.hang_report import Member
from launch.health.health_folder import HealthFolder
from launch.health.processes import process_state
from launch.health.time_limits import STEP, Pace
from launch.health.watchdog import Patience, Watchdog
from launch.sections.health import HealthSection
from tests.distributed.harness import run_distributed

ROOT = Path(__file__).resolve().parents[2]
WORLD = 4
PATIENCE = Patience(tick=0.1, hear=0.3, answer=3.0, grace=0.0)
LIMIT = 3.0
"""Seconds of a step: many times what one takes on a busy machine."""
LONG = 600.0
"""Seconds that nothing waits for that goes well."""


class Case:
    """A few quick steps, and then one in which some rank misbehaves until the others have found out."""

    def __init__(self, folder: str, name: str) -> None:
        self.rank = dist.get_rank()
        self.folder = HealthFolder(Path(folder), name)
        self.members: list[Member] = [Member(0, "", 0)] * WORLD
        dist.all_gather_object(self.members, Member(self.rank, f"host-{self.rank // 2}", os.getpid()))
        self.pace = Pace(HealthSection(minimum_step_seconds=LIMIT, first_step_seconds=60.0))
        dist.barrier()
        self.watchdog = Watchdog(self.folder, self.pace, self.rank, self.members, PATIENCE, stops=False)
        for step in range(1, 8):
            self.step(step)

    def step(self, number: int, before: Callable[[], object] = lambda: None) -> None:
        self.pace.begin(STEP, number)
        before()
        dist.all_reduce(torch.ones(1))

    def verdict(self, spokesman: int) -> str:
        deadline = time.monotonic() + LONG
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
        case.step(step, lambda: time.sleep(LIMIT / 6 if case.rank == 1 else 0))
    return case.close()


def rank_zero_stopped(folder: str) -> str:
    """Rank 3 lets it go on once the others have spoken."""
    case = Case(folder, "stopped")

    def misbehave() -> None:
        if case.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if case.rank == 3:
            case.verdict(1)
            pid = case.members[0].pid
            pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
            os.kill(pid, signal.SIGCONT)
            assert pending and not int(pending[1], 16) >> signal.SIGURG - 1 & 1, "asked for a stack while it is stopped"

    case.step(8, misbehave)
    return case.close()


def reads_for_ever(folder: str) -> str:
    case = Case(folder, "reads")
    case.step(8, lambda: case.verdict(0) if case.rank == 2 else None)
    return case.close()


def holds_the_lock(folder: str) -> str:
    """A call into C that keeps Python's lock, so that no thread of the rank can answer. It waits for a file that rank 3
    has until the others have spoken."""
    case = Case(folder, "lock")
    with open(Path(folder) / "awaited", "w") as file:
        if case.rank == 3:
            fcntl.flock(file, fcntl.LOCK_EX)
        dist.barrier()

        def misbehave() -> None:
            if case.rank == 1:
                ctypes.PyDLL(None).flock(file.fileno(), fcntl.LOCK_EX)
            if case.rank == 3:
                case.verdict(0)
                fcntl.flock(file, fcntl.LOCK_UN)

        case.step(8, misbehave)
    return case.close()


def cases(folder: str) -> list[str]:
    return [case(folder) for case in (late_but_not_too_late, rank_zero_stopped, reads_for_ever, holds_the_lock)]


RANK = """
import os, signal, sys, time
from pathlib import Path
from launch.environment import node_pulses, place_in_world
from launch.health.hang_report import Member
from launch.health.health_folder import HealthFolder
from launch.health.time_limits import STEP, Pace
from launch.health.watchdog import Patience, Watchdog
from launch.sections.health import HealthSection

place, pulses, stops, folder = place_in_world(), node_pulses(), sys.argv[-2] == "stops", Path(sys.argv[-1])
(folder / f"pid-{place.rank}.partial").write_text(str(os.getpid()))
(folder / f"pid-{place.rank}.partial").rename(folder / f"pid-{place.rank}")
while not (folder / f"pid-{1 - place.rank}").exists():  # however long the other takes to import all this
    time.sleep(0.01)

def beat(pulse):
    pulses.write(place.local_rank, pulse)
    if stops and pulse.activity == "step 8":
        os.kill(os.getpid(), signal.SIGSTOP)

pace = Pace(HealthSection(minimum_step_seconds=2.0, first_step_seconds=2.0))
members, patience = [Member(rank, "host", 0) for rank in range(2)], Patience(tick=0.1, hear=0.3, grace=1.0)
pace.begin(STEP, 8)
Watchdog(HealthFolder(folder, "7-0"), pace, place.rank, members, patience, stops=True, beat=beat)
time.sleep(1000)
"""
NODE = """
import sys
from launch import slurm_node
from launch.health import node_watch
node_watch._TICK, node_watch._LATE = 0.1, 2.0
sys.exit(slurm_node.main())
"""


def node_with_two_ranks(folder: Path, what_they_do: str) -> subprocess.Popen[str]:
    """As `launch/slurm_job.py` starts one, but with less patience; the ranks hang in step 8."""
    (folder / "logs").mkdir()
    (folder / "rank.py").write_text(RANK)
    options = ["--nodes", "localhost", "--processes", "2", "--port", "1", "--logs", str(folder / "logs")]
    options += ["--health", str(HealthFolder(folder, "7-0").path)]
    command = [sys.executable, "-c", NODE, *options, "--", str(folder / "rank.py"), what_they_do, str(folder)]
    variables = {"SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)


def pids_of_ranks(folder: Path) -> list[int]:
    return [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]


def test_a_node_speaks_for_ranks_that_are_all_stopped_and_ends_them(tmp_path: Path) -> None:
    with node_with_two_ranks(tmp_path, "stops") as node:
        try:
            told, _ = node.communicate(timeout=LONG)
        finally:
            node.kill()
    assert node.returncode == HUNG, told
    assert re.search(r"hang: .* step 8 takes \d+ s longer than it may, and no watchdog has spoken; ", told)
    for rank, pid in enumerate(pids_of_ranks(tmp_path)):
        assert re.search(rf"^rank {rank} on .*, step 8; process {pid}: state T \(stopped by a signal\)", told, re.M)
        deadline = time.monotonic() + LONG
        while not process_state(pid).startswith(("state Z", "it is gone")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (verdict,) = HealthFolder(tmp_path, "7-0").told()
    assert verdict.read_text() in told


def test_a_node_speaks_while_the_shared_file_system_hangs(tmp_path: Path) -> None:
    """Whoever opens the alarm, which is a pipe that nobody writes, waits for ever: all ranks, and the node itself."""
    shared = HealthFolder(tmp_path, "7-0")
    shared.path.mkdir(parents=True)
    os.mkfifo(shared.path / "alarm")
    with node_with_two_ranks(tmp_path, "reads") as node:
        assert node.stdout is not None
        late = threading.Timer(LONG, node.kill)
        late.start()
        try:
            told = list(islice((line for line in node.stdout if line.startswith(("hang: ", "rank 1"))), 2))
        finally:
            late.cancel()
            node.kill()
    assert "hang: " in told[0] and f"step 8; process {pids_of_ranks(tmp_path)[1]}: state S (sleeping)" in told[1]


def test_the_missing_rank_is_named(tmp_path: Path) -> None:
    told = run_distributed(cases, WORLD, str(tmp_path))
    late, stopped, reads, lock = told[0]
    assert told == [told[0]] * WORLD
    assert late == ""
    assert "missing: rank 0 on host-0, which does not answer" in stopped
    assert "ranks 1-2 on host-0, host-1, waiting in all_reduce, called at" not in reads
    assert "ranks 1-2 on host-0, host-1, waiting in all_reduce" in stopped and "rank 3 on host-1" in stopped
    assert "missing: rank 2 on host-1, which is in no collective; step 8, for " in reads
    assert "ranks 0-1, 3 on host-0, host-1, waiting in all_reduce" in reads
    assert "test_watchdog.py" in reads.partition("rank 2 on host-1:")[2]  # where it is instead
    assert "missing: rank 1 on host-0, which does not answer" in lock and "holds_the_lock" in lock
    assert all(f"step 8 takes longer than {LIMIT:.0f} s: health.minimum_step_seconds" in one for one in told[0][1:])
    assert HealthFolder(tmp_path, "reads").suspects() == ["host-1"]
