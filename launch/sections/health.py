"""Section `health`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.sections.base import Section
from launch.settings.rules import Job, idle


class HealthSection(Section):
    """Slow nodes, slow ranks and hangs (docs/slurm.md)."""

    probe: bool = True
    """Before the first step, measure each node's devices, links and file system, and hold them against the others'."""
    outlier: float = Field(default=0.7, gt=0, lt=1)
    """Share of its peers' median below which a measured rate is an outlier."""
    exclude: bool = False
    """Under Slurm, queue the job again at once without the nodes that a probe has found outliers or on which a hang's
    missing ranks were."""
    step_limit: float = Field(default=10.0, gt=1)
    """Times the median of the last 20 steps, after which a step counts as hung."""
    minimum_step_seconds: float = Field(default=120.0, gt=0)
    """A step may always take so long."""
    first_step_seconds: float = Field(default=1800.0, gt=0)
    """What the start, each of the first five steps, an evaluation and a checkpoint may take at least."""
    on_hang: Literal["stop", "report"] = "stop"
    """stop ends a run that hangs after telling who is missing, so that it can go on elsewhere; report only tells."""
    hang_grace_seconds: float = Field(default=60.0, ge=0)
    """How long after that a step may still end by itself; the run then saves before it ends."""
    straggler: float = Field(default=1.3, gt=1)
    """Times its peers' median at ten logged steps in a row, from which on a rank is named as slow."""


@idle("health.outlier")
def _nothing_is_measured(job: Job) -> str | None:
    if not job.health.probe:
        return "probe is false, so that no rates are measured; set health.probe=true, or leave this out"
    return None


@idle("health.hang_grace_seconds")
def _no_hang_ends_the_run(job: Job) -> str | None:
    if job.health.on_hang == "report":
        return f"on_hang is {job.health.on_hang}, which ends no run; set health.on_hang=stop, or leave this out"
    return None
