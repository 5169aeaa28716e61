"""Section `health`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.sections.base import Section
from launch.settings.rules import Job, idle


class HealthSection(Section):
    """Slow nodes, slow ranks and hangs (docs/slurm.md)."""

    probe: bool = True
    """Before the first step, measure each node's devices, links and file system, and compare them with the others'."""
    outlier: float = Field(default=0.7, gt=0, lt=1)
    """A measured rate below this share of its peers' median is an outlier."""
    exclude: bool = False
    """Under Slurm, queue the job again at once without nodes that a probe found to be outliers, or on which the missing
    ranks of a hang were."""
    step_limit: float = Field(default=10.0, gt=1)
    """A step counts as hung after this many times the median of the last 20 steps."""
    minimum_step_seconds: float = Field(default=120.0, gt=0)
    """A step may always take this long."""
    first_step_seconds: float = Field(default=1800.0, gt=0)
    """The start, each of the first five steps, an evaluation and a checkpoint may always take this long."""
    on_hang: Literal["stop", "report"] = "stop"
    """stop: report who is missing, and end the run so that it can continue elsewhere. report: only report."""
    hang_grace_seconds: float = Field(default=60.0, ge=0)
    """How long after the report a step may still end by itself. If it does, the run saves before it ends."""
    straggler: float = Field(default=1.3, gt=1)
    """A rank is reported as slow after ten logged steps in a row at more than this many times its peers' median."""


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
