"""The name of a step's checkpoint, and which checkpoints a storage holds. Imports no torch: a job script asks too."""

from __future__ import annotations

import re

from launch.saving.manifest import damage
from launch.saving.storage import Storage

_COMPLETE = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be loaded; the message says which and what to do."""


def step_name(step: int) -> str:
    """Name of the checkpoint saved after `step` steps."""
    return f"step-{step:08d}"


def complete_steps(storage: Storage) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    matches = (_COMPLETE.fullmatch(name) for name in storage.names())
    return sorted(int(match.group(1)) for match in matches if match)


def removable(steps: list[int], keep_last: int, keep_every: int = 0) -> list[int]:
    """Which of ascending `steps` go: all but the last, and but those at multiples of `keep_every` (0: none)."""
    return [step for step in steps[:-keep_last] if not keep_every or step % keep_every]


def newest_checkpoint(storage: Storage, step: int | None = None, *, verify: bool = False) -> str:
    """The name of a run's newest complete checkpoint, or of the one at `step`, for readers outside the run.

    Its files have their sizes; `verify` reads them and compares their checksums. Needs no process group. Raises
    CheckpointError.
    """
    found = complete_steps(storage)
    if not found:
        raise CheckpointError(f"{storage.location} holds no complete checkpoint; train the run until it saves one")
    if step is not None and step not in found:
        steps = ", ".join(map(str, found))
        raise CheckpointError(f"{storage.location} holds no checkpoint of step {step}; there are those of {steps}")
    name = step_name(found[-1] if step is None else step)
    if fault := damage(storage, name, 0, 1, contents=verify):
        raise CheckpointError(
            f"checkpoint {name} in {storage.location} is damaged: {fault}; give --step to take another"
        )
    return name
