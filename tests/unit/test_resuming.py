"""What a run is told of what it continues from, and which runs need a place to save."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from launch.config import JobConfig
from launch.resuming import beginning, checkpoints_of, resume
from launch.saving.checkpoint_records import Progress, Resumed
from launch.saving.ranks import in_words

JOB = """
job: {{run_directory: {folder}}}
model: {{vocab_size: 256, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
         num_key_value_heads: 1}}
data: {{source: python_stdlib}}
optimizer: {{learning_rate: 0.01}}
training: {{sequence_length: 64, global_batch_size: 8, max_steps: 10}}
checkpoint: {{save_interval: 2, keep_last: 4, keep_every: 6, asynchronous: {asynchronous}, accept_changes: [data]}}
"""


def resumed(step: int) -> Resumed:
    return Resumed("", Progress(step, tokens=4096), {}, {}, ["optimizer.learning_rate is 0.1 there and 0.2 here"])


@pytest.mark.parametrize(("step", "saves"), [(None, True), (9, True), (10, False)])
def test_only_a_run_with_steps_to_go_needs_a_place_to_save(step: int | None, saves: bool, tmp_path: Path) -> None:
    checkpoints = Mock()
    checkpoints.load_latest.return_value = resumed(step) if step else None
    found = resume(JobConfig.from_yaml(JOB.format(folder=tmp_path, asynchronous="true")), checkpoints, Mock())
    assert (found and found.progress.step) == step and checkpoints.check_writable.called == saves


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_are_kept_as_the_job_says(asynchronous: bool, tmp_path: Path) -> None:
    job = JobConfig.from_yaml(JOB.format(folder=tmp_path, asynchronous=str(asynchronous).lower()))
    with patch("launch.saving.checkpoint.Ranks"):
        made = checkpoints_of(job)
    assert (made.keep_last, made.keep_every, made.asynchronous, made.accept_changes) == (4, 6, asynchronous, ("data",))
    assert made.storage.location == str(tmp_path / "checkpoints") and made.settings["training.sequence_length"] == 64


def test_the_log_says_what_a_run_begins_from() -> None:
    assert list(beginning(None, None)) == []
    assert list(beginning(None, "weights of runs/a")) == ["started from the weights of runs/a"]
    assert list(beginning(resumed(7), None)) == [
        "resumed from step 7, 4,096 tokens seen",
        "changed since the checkpoint: optimizer.learning_rate is 0.1 there and 0.2 here",
    ]


def test_an_error_without_words_of_its_own_is_named() -> None:
    assert in_words(KeyError("format")) == "KeyError: 'format'"
    assert in_words(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
