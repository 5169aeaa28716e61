"""Section `profile`, and the rule that is about it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from launch.sections.base import Section
from launch.settings.rules import Job, rule


class ProfileSection(Section):
    """A trace of a few steps (docs/performance.md)."""

    steps: Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None, Field(strict=False)] = None
    """First and last step to trace, counted from 1; null: none. Each rank writes its trace into the run directory, and
    rank 0 prints where the time went."""


@rule(
    "profile.steps",
    "training.max_steps",
    "training.max_tokens",
    "training.global_batch_size",
    "training.sequence_length",
)
def _traced_steps_are_made(job: Job) -> None:
    if job.profile.steps is None or (job.training.max_steps is None and job.training.max_tokens is None):
        return
    (first, last), total = job.profile.steps, job.training.total_steps
    if not first <= last <= total:
        raise ValueError(
            f"profile.steps ([{first}, {last}]) must be a first and a last step in order, within the job's steps "
            f"({total}); give for example [{max(1, total - 2)}, {total}]"
        )
