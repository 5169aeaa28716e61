"""A submission: what it keeps with the run, what sbatch answers, and what is read back of it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launch import status, submit
from launch.config import load_job
from launch.slurm.submission import Submission
from tests.unit.slurm_stand_ins import submitted


def test_a_submission_is_kept_with_the_run(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = submitted(chain=3)
    assert made.job_ids == (7, 8, 9) and Submission.read(made.folder) == made
    first, second, third = slurm.read_text().splitlines()
    assert first.endswith("job.sbatch --followed") and "--dependency" not in first
    assert "--dependency=afterok:7 --kill-on-invalid-dep=yes" in second and second.endswith("--followed")
    assert "--dependency=afterok:8" in third and not third.endswith("--followed")
    assert load_job(made.config, [], 4).job.name == "quickstart"
    assert status.main(["runs/quickstart"]) == 0
    told = capsys.readouterr().out
    assert "job 7        RUNNING, restarts 2" in told and "step         0 of 200" in told
    assert status.main(["runs"]) == 2


def test_what_a_crash_or_a_hand_has_damaged_is_told_or_left_out(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted()
    made.note_start(step=0, nodes=["node-1"], job="7", restart=0)
    with open(made.folder / "slices.jsonl", "a") as file:
        file.write('{"time": "2026-1')
    (made.run / "metrics.jsonl").write_bytes(b'[1]\n{"step": 3, "loss": 1.5}\n{"step": 4, "lo\xff\n')
    assert [start["step"] for start in made.slices()] == [0] and made.idle_slices(0) == 1
    assert status.main(["runs/quickstart"]) == 0
    assert "step         3 of 200" in capsys.readouterr().out
    (made.folder / "submission.json").write_text("{}")
    assert status.main(["runs/quickstart"]) == 2
    assert "submission.json is not what launch/submit.py wrote (KeyError('srun_options'))" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "job"), [("Welcome to the cluster\n77;main", 77), ("Submitted batch job 77", None)])
def test_what_sbatch_says_beside_the_id(slurm: Path, answer: str, job: int | None) -> None:
    program = slurm.parent / "bin" / "sbatch"
    program.write_text(f"#!/bin/bash\nprintf {shlex.quote(answer)}\n")
    if job is not None:
        assert submitted().job_ids == (job,)
        return
    with pytest.raises(submit.SubmitError, match="the job may be queued; look with squeue"):
        submitted()
    assert list(Path("runs/quickstart/slurm").glob("*/job.sbatch")), "a job that is queued needs it"


def test_a_refused_submission_leaves_nothing(slurm: Path) -> None:
    slurm.write_text("x\n" * 12)
    with pytest.raises(submit.SubmitError, match="sbatch refused the job: Invalid account"):
        submitted(chain=3)
    assert "scancel 19" in slurm.read_text()
    assert not list(Path("runs/quickstart/slurm").iterdir())


def test_starts_without_progress_count_anew_when_other_nodes_are_avoided(slurm: Path) -> None:
    made = submitted()
    for excluded in ([], [], ["node-4"]):
        made.note_start(step=5, excluded=excluded)
    assert made.idle_slices(5) == 1
    made.note_start(step=5, excluded=["node-4"])
    assert made.idle_slices(5) == 2 and made.idle_slices(6) == 0


def test_half_a_line_of_a_crash_is_no_start(slurm: Path) -> None:
    made = submitted()
    made.note_start(step=5)
    with open(made.folder / "slices.jsonl", "a") as file:
        file.write('{"time": "2026-11')
    made.note_start(step=5)
    assert [start["step"] for start in made.slices()] == [5, 5] and made.idle_slices(5) == 2
