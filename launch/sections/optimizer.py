"""Section `optimizer`, and the rule that is about it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launch.sections.base import Section
from launch.sections.training import OF_TOTAL_STEPS
from launch.settings.rules import Job, idle, rule

_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW (arXiv:1711.05101) and its learning-rate schedule."""

    learning_rate: float = Field(gt=0)
    """Peak of the schedule."""
    betas: Annotated[tuple[_Decay, _Decay], Field(strict=False)] = (0.9, 0.95)
    """Decay of Adam's two running means, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second mean."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; norms are left alone."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warmup. cosine: down to the minimum. wsd: constant, then a decay at the end (arXiv:2404.06395).
    constant: no decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last step's learning rate as a share of the peak; not used by constant."""
    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of all steps that wsd spends decaying."""


@rule("optimizer.warmup_steps", "optimizer.schedule", "optimizer.decay_fraction", *OF_TOTAL_STEPS)
def _schedule_fits_the_run(job: Job) -> None:
    if not job.training.ends:
        return  # another rule's to report
    total, warmup = job.training.total_steps, job.optimizer.warmup_steps
    if warmup > total:
        raise ValueError(
            f"warmup_steps ({warmup}) must not exceed the job's steps ({total}); "
            "lower it, or raise training.max_steps or training.max_tokens"
        )
    decay = round(job.optimizer.decay_fraction * total)
    if job.optimizer.schedule == "wsd" and warmup + decay > total:
        raise ValueError(
            f"warmup_steps ({warmup}) and wsd's decay ({job.optimizer.decay_fraction} of {total} steps, {decay}) "
            f"exceed the job's steps ({total}) together; lower warmup_steps to {total - decay} or less, "
            "or lower decay_fraction"
        )


@idle("optimizer.min_learning_rate_ratio")
def _no_minimum_is_reached(job: Job) -> str | None:
    schedule = job.optimizer.schedule
    if schedule == "constant":
        return f"schedule ({schedule}) stays at the peak; set optimizer.schedule=cosine or wsd, or leave this out"
    return None


@idle("optimizer.decay_fraction")
def _no_decay_of_its_own(job: Job) -> str | None:
    schedule = job.optimizer.schedule
    if schedule != "wsd":
        return f"schedule ({schedule}) has no decay of a given length; set optimizer.schedule=wsd, or leave this out"
    return None
