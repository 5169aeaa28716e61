"""Section `checkpoint`, and the rules that are about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.saving.resume_checks import check_acceptable
from launch.saving.storage import check_client
from launch.sections.base import ListOf, Section
from launch.settings.rules import Job, idle, rule
from launch.user_path import UserPath


class CheckpointSection(Section):
    """Saving and resuming (docs/checkpoints.md)."""

    directory: UserPath | None = None
    """Where checkpoints go: a directory that all nodes share, or a URL that fsspec reads, such as s3://bucket/{name}.
    {name} stands for job.name. null: checkpoints in the run directory."""
    save_interval: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept; older ones are removed after a new one is complete."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep, for good, checkpoints at multiples of this many steps; 0: none."""
    asynchronous: bool = True
    """Write in the background. Training waits only while its state is copied to host memory, 12 bytes for each
    parameter that a rank keeps. false: write from the state itself, while training waits."""
    on_save_error: Literal["warn", "stop"] = "warn"
    """What a failed save does in the middle of a run. warn: the job continues. stop: the job ends, as it always does
    after a failed last save."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto: continue from the newest checkpoint if there is one. required: fail if there is none. never: start anew,
    and fail if there is one."""
    accept_changes: ListOf[str] = ()
    """Keys that may differ from the checkpoint's although a resume would otherwise refuse that, such as
    optimizer.betas. data accepts other tokens. Keys that change the shape of the model's tensors cannot be accepted."""


@rule("checkpoint.keep_every", "checkpoint.save_interval")
def _what_is_kept_is_saved(job: Job) -> None:
    every, interval = job.checkpoint.keep_every, job.checkpoint.save_interval
    if every and (not interval or every % interval):
        raise ValueError(
            f"keep_every ({every}) must be a multiple of save_interval ({interval}), or no checkpoint would be at its "
            f"steps; nearest valid: {max(1, round(every / interval)) * interval if interval else 'save_interval > 0'}"
        )


@rule("checkpoint.directory")
def _storage_can_be_reached(job: Job) -> None:
    """Its client is installed; whether the place exists and may be written is seen when the job runs."""
    directory = job.checkpoint.directory
    if directory is None:
        return
    try:
        check_client(directory)
    except (ValueError, ImportError) as error:
        raise ValueError(f"nothing here reads {directory} ({error}); give a path, or install the client") from None


@rule("checkpoint.accept_changes")
def _changes_can_be_accepted(job: Job) -> None:
    check_acceptable(job.checkpoint.accept_changes)


@idle("checkpoint.on_save_error")
def _nothing_is_saved_on_the_way(job: Job) -> str | None:
    interval = job.checkpoint.save_interval
    if interval == 0:
        return f"save_interval ({interval}) saves only at the end, where a failure ends the job anyway; raise that"
    return None


@idle("checkpoint.accept_changes")
def _nothing_is_resumed(job: Job) -> str | None:
    resume = job.checkpoint.resume
    if resume == "never":
        return f"resume ({resume}) reads no checkpoint; set checkpoint.resume=auto, or leave this out"
    return None
