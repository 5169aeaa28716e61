"""Shows how a run under Slurm is doing: `python launch/status.py RUN_DIRECTORY`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.health.health_folder import HealthFolder
from launch.slurm.submission import LATEST, Submission, newest_submission
from launch.standard_output import output_matters
from launch.user_path import user_path


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 where there is no such run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=user_path, help="run directory")
    options = parser.parse_args(arguments)
    try:
        submission = newest_submission(options.run)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(submission, options.run))
    return 0


def report(submission: Submission, run: Path) -> str:
    """State, restarts, step, speed, last checkpoint, and where the logs are."""
    slices, logged, total = submission.slices(), _last_logged(run / "metrics.jsonl"), submission.total_steps
    saved, newest = submission.saved_step(), submission.job_ids[-1]
    speed = f", {logged['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logged else ""
    rows = [(f"job {job_id}", _state(job_id)) for job_id in submission.job_ids]
    rows += [
        ("starts", f"{len(slices)}" + (f", the last from step {slices[-1]['step']}" if slices else "")),
        ("nodes", " ".join(slices[-1]["nodes"]) if slices else "none yet"),
        ("step", f"{logged.get('step', saved)} of {total}{speed}"),
        ("loss", f"{logged['loss']:.4f}" if isinstance(logged.get("loss"), float) else "none yet"),
        *([("avoided", ",".join(slices[-1]["excluded"]))] if slices and slices[-1].get("excluded") else []),
        *[("hung", str(told)) for told in _verdicts(run, slices)[-1:]],
        ("checkpoint", f"step {saved} in {submission.checkpoint_location}" if saved else "none yet"),
        ("log", str(submission.log(slices[-1]["job"] if slices else newest))),
        ("ranks' logs", str(submission.folder / LATEST)),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _state(job_id: int) -> str:
    """What Slurm knows of a job: its state, why it waits, how often it was restarted."""
    if shutil.which("scontrol") is None:
        return "unknown: scontrol is not on PATH"
    ended = subprocess.run(["scontrol", "show", "job", "--oneliner", str(job_id)], capture_output=True, text=True)
    known = dict(re.findall(r"\b(JobState|Reason|Restarts|RunTime|ExitCode)=(\S+)", ended.stdout))
    if "JobState" in known:
        why = f" ({known['Reason']})" if known.get("Reason", "None") != "None" else ""
        restarts = known.get("Restarts", "0")
        return f"{known['JobState']}{why}, restarts {restarts}, run time {known.get('RunTime', 'unknown')}"
    if shutil.which("sacct") is None:
        return "not in the queue any more"
    past = subprocess.run(
        ["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", str(job_id)], capture_output=True, text=True
    ).stdout.strip()
    return past.replace("|", ", exit code ") or "not in the queue any more"


def _verdicts(run: Path, slices: Sequence[dict[str, Any]]) -> list[Path]:
    """What the watchdogs of this submission's starts have said, oldest first."""
    names = [f"{start['job']}-{start['restart']}" for start in slices if "job" in start]
    return [told for name in names for told in HealthFolder(run, name).told()]


def _last_logged(path: Path) -> dict[str, Any]:
    """The last whole training entry of metrics.jsonl."""
    if not path.exists():
        return {}
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            entry: Any = json.loads(line)
        except ValueError:  # being written
            continue
        if isinstance(entry, dict) and "loss" in entry:
            return entry
    return {}


if __name__ == "__main__":
    sys.exit(main())
