"""The interface through which the trainer reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy.typing as npt


@dataclass(frozen=True)
class StepRecord:
    """One logged step. Times are means over the steps since the record before."""

    step: int
    """Updates done, this one included."""
    loss: float
    """Nats per token."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Seen by the run so far, this step included."""
    seconds: float
    """Wall time of a step."""
    parts: Mapping[str, float]
    """Seconds of a step by part: data, compute, optimizer."""
    peak_memory_bytes: int
    """On this device."""
    stragglers: Mapping[str, float]
    """The slowest rank and how slow it is, by name."""
    extra: Mapping[str, float]
    """More training scalars by name, as the loss scale."""


class Monitor:
    """What the trainer calls on every rank. Rank 0 has a `launch.monitoring.run_monitor`; this one says nothing."""

    def advance(self, step: int) -> None:
        """Step `step` is done: moves the bar, needs no value from the device."""

    def log_step(self, record: StepRecord) -> None:
        """The results of a step, and of those since the record before."""

    def log_validation(self, step: int, loss: float, extra: Mapping[str, float]) -> None:
        """The validation loss after `step` updates, and scalars to stand beside it."""

    def log_histograms(self, step: int, values: Mapping[str, npt.ArrayLike]) -> None:
        """Distributions by name; anything numpy reads."""

    def text(self, tag: str, text: str) -> None:
        """Preformatted text for TensorBoard: the configuration, the layout."""

    def message(self, text: str) -> None:
        """A line for the terminal."""

    def close(self) -> None:
        """Flushes everything; may be called twice."""
