"""Section `profile`, and the rule that is about it."""

from __future__ import annotations

from launch.data.skipped import in_words, steps_skipped
from launch.sections.base import Section, StepRange
from launch.sections.training import OF_TOTAL_STEPS
from launch.settings.rules import Job, rule


class ProfileSection(Section):
    """A trace of a few steps (docs/performance.md)."""

    steps: StepRange | None = None
    """First and last step to trace, counted from 1; null: none. Each rank writes its trace into the run directory, and
    rank 0 prints where the time went."""


@rule("profile.steps", *OF_TOTAL_STEPS)
def _traced_steps_are_made(job: Job) -> None:
    if job.profile.steps is None or not job.training.ends:
        return
    (first, last), total = job.profile.steps, job.training.total_steps
    if not first <= last <= total:
        raise ValueError(
            f"profile.steps ([{first}, {last}]) must be a first and a last step in order, within the job's steps "
            f"({total}); give for example [{max(1, total - 2)}, {total}]"
        )


@rule("profile.steps", "training.skip_steps")
def _traced_steps_are_not_skipped(job: Job) -> None:
    if job.profile.steps is None:
        return
    first, last = job.profile.steps
    if skipped := steps_skipped(job.training.skip_steps, first - 1, last):
        raise ValueError(
            f"profile.steps ([{first}, {last}]) has {in_words(skipped)} in it, which training.skip_steps leaves out; "
            "trace others"
        )
