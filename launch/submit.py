"""Submits a job to Slurm: `python launch/submit.py configs/NAME.yaml [section.key=value ...]`.

The job is checked as a whole first, on slurm.nodes x slurm.gpus_per_node processes. Exit status: 0 submitted, 1 Slurm
refused or the run directory cannot be written, 2 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.check import layout_report
from launch.config import JobConfig, load_job
from launch.data.inspection import inspect_data
from launch.run_lock import RunDirectoryError, writing_into
from launch.slurm.batch_script import gpu_request, render
from launch.slurm.submission import CONFIG, SCRIPT, Submission, point_latest
from launch.standard_output import output_matters
from launch.user_path import user_path

_LAUNCH = Path(__file__).resolve().parent


class SubmitError(RuntimeError):
    """Slurm that is not there, or that refuses the job."""


class UnknownJob(SubmitError):
    """An answer of sbatch without a job's id: a job may run from the folder, which stays."""


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    try:
        job = checked(options.config, options.overrides)
        folder = _new_folder(job)
        script = _script(job, folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for line in (*job.idle_keys(job.slurm.processes), *inspect_data(job)[1]):
        print(f"warning: {line}", file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return 0
    try:
        submission = submit(job, folder, script, options.chain)
    except (SubmitError, RunDirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for job_id in submission.job_ids:
        print(f"job {job_id}, log {submission.log(job_id)}")
    print(f"follow it with: python launch/status.py {job.run_path}")
    return 0


def checked(path: Path, overrides: Sequence[str]) -> JobConfig:
    """The job, valid on the processes that its slurm section asks for. Raises ConfigError."""
    world_size = load_job(path, overrides).slurm.processes
    job = load_job(path, overrides, world_size)
    layout_report(job, world_size)  # what only a layout shows is seen here too
    return job


def submit(job: JobConfig, folder: Path, script: str, chain: int = 1) -> Submission:
    """Writes the submission into the run directory and hands it to sbatch. Raises SubmitError, leaving nothing."""
    if shutil.which("sbatch") is None:
        raise SubmitError("sbatch is not on PATH; run this on a login node of the cluster, or look with --dry-run")
    submission = _submission(job, folder)
    with writing_into(job.run_path):
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(job.to_yaml())
        (folder / SCRIPT).write_text(script)
        _write_revision(folder)
        submission.write()  # a job may start at once
    ids: list[int] = []
    try:
        for link in range(chain):
            options = [f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
            followed = ["--followed"] if link < chain - 1 else []
            ids.append(_sbatch([*options, str(folder / SCRIPT), *followed]))
    except UnknownJob:
        raise
    except SubmitError:
        if ids:
            subprocess.run(["scancel", *map(str, ids)], check=False)
        shutil.rmtree(folder)
        raise
    submission = replace(submission, job_ids=tuple(ids))
    submission.write()
    point_latest(folder)
    return submission


def _sbatch(arguments: Sequence[str]) -> int:
    ended = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True)
    if ended.returncode:
        raise SubmitError(f"sbatch refused the job: {ended.stderr.strip()}")
    said = ended.stdout.strip()
    words = re.fullmatch(r"(?:.*\n)?(\d+)(?:;.*)?", said, re.DOTALL)  # "id;cluster" where there are several
    if words is None:
        raise UnknownJob(
            f"sbatch did not say a job's id, but {said!r}: the job may be queued; look with squeue, and call Slurm's "
            "own sbatch, which heeds --parsable"
        )
    return int(words[1])


def _submission(job: JobConfig, folder: Path) -> Submission:
    slurm, request = job.slurm, gpu_request(job)
    return Submission(
        folder=folder,
        run=job.run_path.absolute(),
        checkpoint_location=job.checkpoint_location,
        working_directory=str(Path.cwd()),
        total_steps=job.total_steps,
        nodes=slurm.nodes,
        processes_per_node=slurm.gpus_per_node,
        python=slurm.python or sys.executable,
        train_script=str(_LAUNCH / "train.py"),
        node_script=str(_LAUNCH / "slurm_node.py"),
        srun_options=(*([f"--gres={request}"] if request else []), *slurm.srun_options),
        container=tuple(shlex.split(slurm.container)) if slurm.container else (),
        max_restarts=slurm.max_restarts,
        max_idle_slices=slurm.max_idle_slices,
        exclude=job.health.exclude,
        ends_hangs=job.health.on_hang == "stop",
    )


def _script(job: JobConfig, folder: Path) -> str:
    command = [job.slurm.python or sys.executable, "-u", str(_LAUNCH / "slurm_job.py"), str(folder)]
    return render(job, folder=folder, working_directory=Path.cwd(), command=command)


def _new_folder(job: JobConfig) -> Path:
    """A folder of its own for this submission; not made yet."""
    parent, stamp = job.run_path.absolute() / "slurm", time.strftime("%Y%m%d-%H%M%S")
    names = [stamp, *(f"{stamp}-{number}" for number in range(2, 100))]
    return next(parent / name for name in names if not (parent / name).exists())


def _write_revision(folder: Path) -> None:
    """Which code the job runs, so far as git knows: the commit, and what differs from it."""

    def git(*words: str) -> str | None:
        try:
            ended = subprocess.run(["git", "-C", str(_LAUNCH), *words], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return ended.stdout if ended.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD")
    text = "not a git checkout" if commit is None else commit.strip() + (" and changes.patch" if changes else "")
    (folder / "revision.txt").write_text(text + "\n")
    if changes:
        (folder / "changes.patch").write_text(changes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=user_path, help="YAML file of the job")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one key")
    parser.add_argument("--dry-run", action="store_true", help="print the job script and stop; writes nothing")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each after the one before")
    options = parser.parse_intermixed_args(arguments)
    if options.chain < 1:
        parser.error(f"--chain ({options.chain}) must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
