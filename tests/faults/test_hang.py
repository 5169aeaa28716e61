"""A rank of a running job is stopped: the run is told so, and saves if the rank comes back, or ends without it."""

from pathlib import Path

import pytest

from launch.exit_status import HUNG, STOPPED
from tests.faults.forked import Forked
from tests.faults.launched import TinyJob

pytestmark = pytest.mark.faults

QUICK = ["health.minimum_step_seconds=5", "checkpoint.save_interval=6", "monitor.log_interval=1"]
QUICK += ["health.first_step_seconds=300"]  # where the save of step 6 is still being written at that of step 12


def stopping(rank: int) -> dict[str, object]:
    """While it writes the checkpoint of step 6."""
    where = {"rank": rank, "event": "open", "path": f"step-00000006.partial/__{rank}_0"}
    return where | {"action": "run", "command": "kill -STOP $PPID"}


def verdict(tiny: TinyJob, spokesman: int) -> str:
    return "".join(path.read_text() for path in tiny.run.glob(f"health/*/verdict-{spokesman}.txt"))


def test_a_rank_that_comes_back_costs_no_step(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, cp=2, max_steps=40)
    with Forked(tiny, 2, *QUICK, "health.hang_grace_seconds=60", fault=stopping(1)) as job:
        told = job.until(lambda: verdict(tiny, 0))
        assert "missing: rank 1 on " in told and ", which does not answer; process " in told
        job.resume(1)
        assert [job.exit_status(rank) for rank in (0, 1)] == [STOPPED, STOPPED], job.output[-8000:]
        assert f"stopped after step {tiny.complete()[-1]} of 40" in job.output
    assert tiny.complete()[0] == 6 < tiny.complete()[-1] == tiny.logged() < 40


def test_a_rank_that_does_not_come_back_is_left(tmp_path: Path) -> None:
    """Rank 0, where the job's own log comes from."""
    tiny = TinyJob(tmp_path, cp=2, max_steps=40)
    with Forked(tiny, 2, *QUICK, "health.hang_grace_seconds=1", fault=stopping(0)) as job:
        assert job.exit_status(1) == HUNG, job.output[-8000:]
        assert "missing: rank 0 on " in verdict(tiny, 1) and verdict(tiny, 1) in job.output
        assert "rank 1 ends: " in job.output and f"exit status {HUNG}" in job.output
    assert tiny.complete() == []
