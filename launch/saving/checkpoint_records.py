"""Small types about checkpoints: progress of the run, how a save ended, what a resume found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launch.saving.checkpoint_names import CheckpointError


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done, skipped ones included: the index of the next batch."""
    tokens: int = 0
    """Tokens seen."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data cursor's record, plain JSON (see `launch.data.cursor`): what the order of the data depends on besides
    the step."""


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank."""

    path: str
    seconds: float
    """From the copy of the state to the complete checkpoint."""
    error: CheckpointError | None
    """Why there is none, or, if `complete`, why older ones stayed."""
    complete: bool


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says of the run that it continues."""

    path: str
    progress: Progress
    losses: dict[str, float]
    """Step -> loss of the last steps before it."""
    batches: dict[str, str]
    """Step -> hash of the global batches after it."""
    told: list[str]
    """Settings that differ and may."""
