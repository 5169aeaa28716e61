"""Checks that a run that resumes is the run that was saved: the same model, the same data, the same learning.

What is compared, and what a difference means:

    what shapes the model's tensors                        refused for good: the saved ones do not fit
    the rest of model, data, samples, Adam's betas, eps    refused until accepted: another meaning of what is saved
    learning rate, schedule, batch size, clipping, length  reported: the user may want to change them
    layout, kernels, intervals, names                      not compared: they change no number but by rounding
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from launch.data.batches import Batches
from launch.data.cursor import ACCEPT_DATA
from launch.schedule import learning_rate_at
from launch.sections.optimizer import OptimizerSection
from launch.sections.training import TrainingSection
from model.config import JOB_KEYS, SHAPE_KEYS, ModelConfig

NEXT_BATCHES = 20
"""Global batches after a checkpoint whose tokens it vouches for."""
LAST_LOSSES = 20
"""Losses before a checkpoint that it remembers."""

_FIXED = (
    "job.seed",
    "training.sequence_length",
    "data.document_mask",
    "optimizer.betas",
    "optimizer.eps",
)
_STEERED = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.min_learning_rate_ratio",
    "optimizer.decay_fraction",
    "training.gradient_clipping",
    "training.global_batch_size",
    "training.max_steps",
    "training.max_tokens",
    "training.precision",
)

_SHAPES = tuple(f"model.{key}" for key in SHAPE_KEYS)
_ACCEPTABLE = (
    ACCEPT_DATA,
    *(f"model.{key}" for key in ModelConfig.model_fields if key not in {*SHAPE_KEYS, *JOB_KEYS}),
    *_FIXED,
)
"""What checkpoint.accept_changes may name."""

_BEFORE_THE_KEY: dict[str, Any] = {"model.full_attention_layers": []}
"""Keys that older checkpoints do not know, and what was so without them."""

Settings = dict[str, Any]
"""section.key -> value, plain JSON."""


def check_acceptable(keys: Collection[str]) -> None:
    """Raises ValueError unless checkpoint.accept_changes may name each of `keys`."""
    shapes = [key for key in keys if key in _SHAPES]
    if shapes:
        raise ValueError(
            f"{', '.join(shapes)} cannot be accepted: the tensors of a checkpoint do not fit another shape; leave this "
            "out, and give a model of another shape another job.name, under which it begins anew"
        )
    unknown = [key for key in keys if key not in _ACCEPTABLE]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no key that a resume refuses; those that can be accepted are "
            f"{', '.join(_ACCEPTABLE)}"
        )


def settings(job: BaseModel) -> Settings:
    """The settings of a `launch.config.JobConfig` that are stored with its checkpoints."""
    sections = job.model_dump(mode="json")
    model = {f"model.{key}": value for key, value in sections["model"].items() if key not in JOB_KEYS}
    keys = (key.split(".") for key in (*_FIXED, *_STEERED))
    return model | {f"{section}.{key}": sections[section][key] for section, key in keys}


def differences(there: Settings, here: Settings, accepted: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """(what forbids a resume, by key; what is only told), each naming a key and both its values."""
    refused: dict[str, str] = {}
    told: list[str] = []
    for key, value in here.items():
        before = there.get(key, _BEFORE_THE_KEY.get(key))
        if before != value:
            text = f"{key} is {before!r} there and {value!r} here"
            if key in _STEERED or key in accepted:
                told.append(text)
            else:
                refused[key] = text
    return refused, told


def refusal(refused: Mapping[str, str]) -> str:
    """Of `differences`, with what to do: to stand after "is of another"."""
    kind = "model" if any(key.startswith("model.") for key in refused) else "run"
    shapes = [key for key in refused if key in _SHAPES]
    if shapes:
        remedy = (
            f"its tensors do not fit another shape: set {', '.join(shapes)} back to go on, or give this model another "
            "job.name, under which it begins anew"
        )
    else:
        remedy = (
            f"give this {kind} another job.name, or, if the change is meant, name {', '.join(refused)} in "
            "checkpoint.accept_changes"
        )
    return f"{kind}: {'; '.join(refused.values())}; {remedy}"


def another_learning_rate(there: Settings, here: Settings, step: int) -> str | None:
    """In words, where the next update (number `step` from 0) has another learning rate than the saved run's schedule
    gives it; None where it has not, or there is none."""
    (before, _), (now, total) = (_learning_rate(known, step) for known in (there, here))
    if step >= total or math.isclose(before, now, rel_tol=1e-6):
        return None
    return f"the learning rate of step {step + 1} is {before:.2e} by the schedule there and {now:.2e} by the one here"


def _learning_rate(known: Settings, step: int) -> tuple[float, int]:
    """Of an update, and the steps of the job."""
    optimizer, training = (
        {key.removeprefix(f"{section}."): value for key, value in known.items() if key.startswith(f"{section}.")}
        for section in ("optimizer", "training")
    )
    total = TrainingSection.model_construct(**training).total_steps
    return learning_rate_at(step, OptimizerSection.model_construct(**optimizer), total), total


def batch_hash(batches: Batches, step: int) -> str:
    """A hash of the token ids and labels of a step's global batch, in order: the same on every layout."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in batches.samples(batches.global_batch(step)):
        digest.update(sample.input_ids.astype("<i8").tobytes())
        digest.update(sample.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def next_batches(batches: Batches, step: int, rank: int, world_size: int) -> dict[str, str]:
    """Step -> hash of this rank's share of the batches from `step` on, without those that no step reads. Every rank can
    read every batch."""
    ahead = [*batches.steps(step, step + NEXT_BATCHES)][rank::world_size]
    return {str(at): batch_hash(batches, at) for at in ahead}


def other_batch(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """The first batch that differs, in words, or None. One that is skipped on either side is not compared."""
    for step in sorted(there.keys() & here.keys(), key=int):
        if there[step] != here[step]:
            return f"the batch of step {int(step) + 1} has hash {there[step][:12]} there and {here[step][:12]} here"
    return None


def unlike_recent(loss: float, recent: Mapping[str, float]) -> str | None:
    """A warning if the first loss after a resume is far from those before the checkpoint; else None."""
    if not recent:
        return None
    low, high = min(recent.values()), max(recent.values())
    room = max(high - low, 0.1 * high)
    if low - room <= loss <= high + room:
        return None
    return (
        f"the first loss after the resume is {loss:.4f}, but the last {len(recent)} before the checkpoint lay between "
        f"{low:.4f} and {high:.4f}; something that this program does not compare (a kernel, a driver) has changed"
    )
