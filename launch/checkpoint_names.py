"""What the checkpoint of a step is called, and which steps a storage holds. Imports no torch: a job script asks too."""

from __future__ import annotations

import re

from launch.storage import Storage

_COMPLETE = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of the checkpoint saved after `step` steps."""
    return f"step-{step:08d}"


def complete_steps(storage: Storage) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    matches = (_COMPLETE.fullmatch(name) for name in storage.names())
    return sorted(int(match.group(1)) for match in matches if match)
