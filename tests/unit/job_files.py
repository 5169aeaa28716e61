"""A small job's file, and what loading it with overrides gives or reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config import ConfigError, JobConfig, load_job
from launch.weights.stored_model import write_model

JOB = """\
job:
  name: test
model:
  vocab_size: 256
  hidden_size: 64
  intermediate_size: 96
  num_hidden_layers: 2
  num_attention_heads: 8
  num_key_value_heads: 4
data:
  source: python_stdlib
optimizer:
  learning_rate: 1e-3
training:
  sequence_length: 64
  global_batch_size: 8
  max_steps: 10
"""


def weights_for(config: Path, folder: Path) -> list[str]:
    """Overrides without which a shipped job is not complete: the shape of the weights that it starts from."""
    if "init_from:" not in config.read_text():
        return []
    write_model(folder, load_job(config.with_name("llama3-8b-8k.yaml")).model)
    return [f"model.init_from={folder}"]


def load(tmp_path: Path, *overrides: str, text: str = JOB, world_size: int | None = None) -> JobConfig:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path, overrides, world_size)


def report(tmp_path: Path, *overrides: str, text: str = JOB, world_size: int | None = None) -> str:
    """The error report, with the file's name in place of its path."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text, world_size=world_size)
    return str(caught.value).replace(str(tmp_path / "job.yaml"), "job.yaml")
