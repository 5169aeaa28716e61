"""DeepSpeed's buffers follow the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from launch.build import zero_settings
from launch.config import load_job
from parallel.zero_config import ModelSizes, ZeroSettings, deepspeed_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def settings(stage: int) -> ZeroSettings:
    return ZeroSettings(stage, "bf16", micro_batch_size=1, accumulation_steps=1, gradient_clipping=1.0)


def model(vocabulary: int, width: int, blocks: int) -> tuple[nn.Module, list[nn.Module]]:
    with torch.device("meta"):
        units: list[nn.Module] = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
            for _ in range(blocks)
        ]
        return nn.Sequential(nn.Embedding(vocabulary, width), *units), units


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("vocabulary", [100, 128_256, 1_000_000])
def test_no_gradient_is_larger_than_the_buffer_it_is_reduced_in(stage: int, vocabulary: int) -> None:
    """Below stage 3 DeepSpeed frees such a gradient while it is being reduced."""
    whole, units = model(vocabulary, 4096, 2)
    sizes = ModelSizes.of(whole, units)
    largest = max(parameter.numel() for parameter in whole.parameters())
    assert sizes.largest_parameter == largest
    assert deepspeed_config(settings(stage), sizes)["zero_optimization"]["reduce_bucket_size"] >= largest


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_gradients_of_a_block_fit_in_one_buffer(stage: int) -> None:
    whole, units = model(1000, 4096, 3)
    sizes = ModelSizes.of(whole, units)
    config = deepspeed_config(settings(stage), sizes)["zero_optimization"]
    assert config["reduce_bucket_size"] >= sum(parameter.numel() for parameter in units[0].parameters())
    assert config["stage3_prefetch_bucket_size"] == 8 * 4096**2, "the block's matrices, and nothing of the next one"
    assert config["stage3_param_persistence_threshold"] == 4 * 4096, "its longest vector"


def test_buffers_are_no_larger_than_a_small_model() -> None:
    whole, units = model(10, 8, 1)
    sizes = ModelSizes.of(whole, units)
    assert deepspeed_config(settings(2), sizes)["zero_optimization"]["reduce_bucket_size"] == sizes.total


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], {"overlap_comm": True, "stage": 3, "zero_hpz_partition_size": 1}),
        (["overlap_communication=false", "zero_stage=2"], {"overlap_comm": False, "stage": 2}),
        (["secondary_partition_size=2"], {"zero_hpz_partition_size": 2}),
        (["offload_optimizer=cpu"], {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}),
        (["offload_optimizer=cpu", "offload_parameters=cpu"], {"offload_param": {"device": "cpu"}}),
        (["gradient_reduce_dtype=bf16"], {"communication_data_type": "bf16"}),
    ],
)
def test_a_jobs_keys_reach_deepspeed(keys: list[str], expected: dict[str, Any]) -> None:
    job = load_job(CONFIGS / "llama3-8b-8k.yaml", [f"parallel.{key}" for key in keys])
    found = deepspeed_config(zero_settings(job, Mock(shape=job.mesh_shape(2)), "cuda"))
    assert (found | found["zero_optimization"]).items() >= expected.items()
