"""What a run continues from: its checkpoint, and its place in the data."""

from __future__ import annotations

from collections.abc import Iterator

from launch.config import JobConfig
from launch.data.corpora import Corpora, fresh_cursor
from launch.data.cursor import DataCursor
from launch.saving import resume_checks
from launch.saving.checkpoint import Checkpoints
from launch.saving.checkpoint_names import CheckpointError
from launch.saving.checkpoint_records import Progress, Resumed
from launch.saving.storage import storage_at
from parallel.zero import ZeroEngine


def checkpoints_of(job: JobConfig) -> Checkpoints:
    """The run's checkpoints. Collective: makes process groups."""
    wanted = job.checkpoint
    return Checkpoints(
        storage_at(job.checkpoint_location),
        keep_last=wanted.keep_last,
        keep_every=wanted.keep_every,
        settings=resume_checks.settings(job),
        asynchronous=wanted.asynchronous,
        accept_changes=wanted.accept_changes,
    )


def resume(job: JobConfig, checkpoints: Checkpoints, engine: ZeroEngine) -> Resumed | None:
    """The newest checkpoint, loaded into `engine`; None for a fresh start. Collective.

    Raises CheckpointError where checkpoint.resume forbids one or the other, the checkpoint does not serve, or the next
    one could not be written.
    """
    wanted, location = job.checkpoint.resume, checkpoints.storage.location
    if wanted == "never":
        if checkpoints.steps():
            raise CheckpointError(
                f"checkpoint.resume is never, but {location} holds checkpoints that a fresh run would "
                "overwrite; choose another job.name, or move them away"
            )
        resumed = None
    else:
        resumed = checkpoints.load_latest(engine)
        if resumed is None and wanted == "required":
            raise CheckpointError(f"checkpoint.resume is required, but {location} holds no complete checkpoint")
    if resumed is None or resumed.progress.step < job.total_steps:
        checkpoints.check_writable()
    return resumed


def cursor_of(job: JobConfig, corpora: Corpora, progress: Progress | None) -> DataCursor:
    """Where the run stands in its data. Raises CorpusError where a resume would repeat or lose some of it."""
    fresh = fresh_cursor(corpora, job)
    if progress is None:
        return fresh
    return DataCursor.from_record(progress.data).continued(progress.step, fresh, job.checkpoint.accept_changes)


def beginning(resumed: Resumed | None, initial: str | None) -> Iterator[str]:
    """Lines that say what the run continues from; none if it starts from random weights."""
    if resumed is not None:
        yield f"resumed from step {resumed.progress.step}, {resumed.progress.tokens:,} tokens seen"
        for change in resumed.told:
            yield f"changed since the checkpoint: {change}"
    if initial is not None:
        yield f"started from the {initial}"
