"""Section `monitor`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.sections.base import Section
from launch.settings.rules import Job, idle


class MonitorSection(Section):
    """What is written while training."""

    log_interval: int = Field(default=10, ge=1)
    """Steps between lines of the log."""
    histograms: bool = False
    """Histograms of parameters in TensorBoard, at each evaluation."""
    progress_bar: Literal["auto", "on", "off"] = "auto"
    """auto shows one on a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device in the job's precision, in 10^12 FLOP/s without sparsity, for the MFU; null: that of the
    device's data sheet, where launch/monitoring/throughput.py has it."""


@idle("monitor.histograms")
def _no_events_are_written(job: Job) -> str | None:
    if not job.monitor.tensorboard:
        return "tensorboard is false, and histograms go nowhere else; set one of them to the other's value"
    return None
