"""Stand-ins for Slurm's commands, and the quickstart submitted and started under them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import slurm_job, submit
from launch.slurm.submission import Submission

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for Slurm's commands, which note how they were called; sbatch counts up from 7."""
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {
        "sbatch": 'n=$(($(wc -l < "$CALLS") + 6)); [ $n -lt 20 ] || { echo "Invalid account" >&2; exit 1; }; echo $n',
        "scontrol": 'if [ "$1 $2" = "show job" ]; then '
        'echo "JobId=7 JobState=$STATE Reason=None Restarts=2 PreemptTime=$PREEMPTED ExcNodeList=node-3"; '
        "else echo node-1; fi",
        "srun": "exit $SRUN_STATUS",
        "scancel": "true",
    }
    for name, answer in answers.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{answer}\n')
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    variables = {"CALLS": calls, "STATE": "RUNNING", "PREEMPTED": "None", "SRUN_STATUS": 0, "SLURM_JOB_ID": 7}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-1")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_job, "_SECONDS_TO_BE_KILLED", 0)
    handlers = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)]
    yield calls
    for number, handler in zip((signal.SIGUSR2, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def submitted(*overrides: str, chain: int = 1) -> Submission:
    job = submit.checked(ROOT / "configs" / "quickstart.yaml", ["slurm.gpus_per_node=4", *overrides])
    folder = submit._new_folder(job)
    return submit.submit(job, folder, submit._script(job, folder), chain)


def slice_of(made: Submission, monkeypatch: pytest.MonkeyPatch, *, restart: int = 0, saves: int = 0) -> int:
    """One start of a job that saves at step `saves` and then ends."""
    if saves:
        (Path(made.working_directory) / made.checkpoint_location / f"step-{saves:08d}").mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    return slurm_job.main([str(made.folder)])
