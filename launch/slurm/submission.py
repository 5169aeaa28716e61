"""What a submission to Slurm leaves in the run directory, and how it is found again. Imports no torch.

RUN/slurm/20261122-214001/       one submission; RUN/slurm/latest leads to the newest
    job.sbatch  config.yaml  revision.txt  changes.patch
    submission.json              what the job script needs to know, and the jobs' ids
    slices.jsonl                 a line for each start of a job: when, where, from which step
    job-123.log                  what the job says, restarts appended
    123-0/  123-1/               a log of each rank, for each start; `latest` leads to the newest
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.atomic_files import write_atomically
from launch.saving.checkpoint_names import complete_steps
from launch.saving.storage import storage_at

SCRIPT, CONFIG, LATEST = "job.sbatch", "config.yaml", "latest"
_FACTS, _SLICES = "submission.json", "slices.jsonl"


@dataclass(frozen=True)
class Submission:
    """One submission's facts, those of them that the nodes read without knowing what a configuration is."""

    folder: Path
    run: Path
    checkpoint_location: str
    """Where the run's checkpoints are, from `working_directory`."""
    working_directory: str
    total_steps: int
    nodes: int
    processes_per_node: int
    python: str
    train_script: str
    node_script: str
    srun_options: tuple[str, ...]
    container: tuple[str, ...]
    max_restarts: int
    max_idle_slices: int
    exclude: bool
    job_ids: tuple[int, ...] = ()
    ends_hangs: bool = True
    """Whether a hang that was told ends the start; what an older version of the program has submitted does not say."""

    def write(self) -> None:
        """Replaces submission.json."""
        write_atomically(self.folder / _FACTS, json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """The inverse of `write`. Raises ValueError."""
        path = folder / _FACTS
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
            for key in ("srun_options", "container", "job_ids"):
                facts[key] = tuple(facts[key])
            return cls(**facts | {"folder": folder, "run": Path(facts["run"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what launch/submit.py wrote ({error!r}); submit the job again") from error

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / CONFIG

    def log(self, job_id: int | str) -> Path:
        """The log of a job."""
        return self.folder / f"job-{job_id}.log"

    def saved_step(self) -> int:
        """Steps in the newest complete checkpoint; 0 before there is one."""
        location = self.checkpoint_location
        if "://" not in location:
            location = os.path.join(self.working_directory, location)
        return max(complete_steps(storage_at(location)), default=0)

    def note_start(self, **facts: Any) -> None:
        """Adds a line to slices.jsonl."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}) + "\n"
        with open(self.folder / _SLICES, "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read() not in (b"", b"\n")
            file.write((b"\n" if torn else b"") + line.encode())

    def slices(self) -> list[dict[str, Any]]:
        """The starts so far; without one of which a crash of its node has left half a line."""
        path, found = self.folder / _SLICES, []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def idle_slices(self, step: int) -> int:
        """How many of the last starts in a row were made from `step`, avoiding the same nodes."""
        count, starts = 0, self.slices()
        for start in reversed(starts):
            if start["step"] != step or start.get("excluded") != starts[-1].get("excluded"):
                break
            count += 1
        return count


def ready(logs: Path, node: int) -> Path:
    """What a node makes once its ranks can be told to stop."""
    return logs / f"ready-{node}"


def newest_submission(run: Path) -> Submission:
    """The last submission of a run. Raises ValueError where there is none."""
    folder = run / "slurm" / LATEST
    if not (folder / _FACTS).exists():
        raise ValueError(f"{run} holds no submission to Slurm; give a run directory that launch/submit.py has made")
    return Submission.read(folder.resolve())


def point_latest(folder: Path) -> None:
    """Lets `latest`, beside `folder`, lead to it."""
    partial = folder.parent / f".{LATEST}-{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.name)
    os.replace(partial, folder.parent / LATEST)
