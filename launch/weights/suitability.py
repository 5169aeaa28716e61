"""How the weights that a job starts from fit the job: what a log and `--check` say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.config import JobConfig
from launch.data.encoders import BYTES, tokenizer_for
from launch.settings.violations import ConfigError
from launch.weights.stored_model import COMPANION_FOLDER, RUN_FILE, stored_model
from model.config import JOB_KEYS


def notes_on(job: JobConfig, folder: Path) -> str:
    """To stand after the name of the weights in `folder`; empty where they are taken as they are."""
    changed = _changed_keys(job, folder)
    another = f", with another {', '.join(changed)}" if changed else ""
    return f"{another}{_unused_tokenizer(job, folder)}{_longer_than_before(job, folder, changed)}"


def longest_context(folder: Path) -> int | None:
    """Tokens: what the run in `folder` trained on, or what its model was made for elsewhere, whichever is more."""
    lengths = [JobConfig.of_run(folder).training.sequence_length] if (folder / RUN_FILE).is_file() else []
    lengths += filter(None, [_companion_config(folder).get("max_position_embeddings")])
    return max(lengths, default=None)


def _companion_config(folder: Path) -> dict[str, Any]:
    """The Hugging Face configuration beside the weights; empty without one."""
    try:
        found = json.loads((folder / COMPANION_FOLDER / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _changed_keys(job: JobConfig, folder: Path) -> list[str]:
    """Keys that the job sets otherwise than the weights were trained with, such as a longer context's rope_scaling."""
    stored, here = stored_model(folder).model_dump(), job.model.model_dump()
    return [key for key in here if key not in JOB_KEYS and here[key] != stored[key]]


def _unused_tokenizer(job: JobConfig, folder: Path) -> str:
    tokenizer = folder / COMPANION_FOLDER / "tokenizer.json"
    if job.data.tokenizer != BYTES or not tokenizer.is_file() or tokenizer_for(tokenizer) == BYTES:
        return ""
    return f"; WARNING: they come with {tokenizer}, but data.tokenizer is {BYTES}"


def _longer_than_before(job: JobConfig, folder: Path, changed: list[str]) -> str:
    """Positions that the weights have never seen, unless the job changes the rotation on purpose."""
    try:
        known, length = longest_context(folder), job.training.sequence_length
    except ConfigError:  # another version's job file, of which the weights need the model section only
        return ""
    if known is None or length <= known or {"rope_scaling", "rope_theta"} & set(changed):
        return ""
    return (
        f"; WARNING: training.sequence_length ({length:,}) is beyond the {known:,} tokens of context that they were "
        "made for; set model.rope_scaling or model.rope_theta for a longer one"
    )
