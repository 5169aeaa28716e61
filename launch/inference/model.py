"""Loads the weights of a run or a converted model for computing only: cut by tensor parallelism, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from launch.config import JobConfig
from launch.data.corpus import CorpusError
from launch.data.encoders import Encoder, encoder_of
from launch.weights.reader import Part, open_weights
from launch.weights.stored_model import COMPANION_FOLDER, RUN_FILE, WeightsError, stored_model
from model.attention import AttentionFunction, kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import select_kernel
from parallel.materialize import materialize
from parallel.mesh import ParallelMesh
from parallel.tensor import apply_tensor_parallel, check_head_divisibility


def attention_on_one_device(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[AttentionFunction]:
    """Each block's self-attention over whole sequences, which prompts are read with."""
    kernel, _ = select_kernel(
        config.attention_backend,
        device_type=device.type,
        dtype=dtype,
        head_dim=config.head_dim,
        window=config.sliding_window is not None,
        documents=False,
    )
    return kernel_attention(kernel, config)


def load_model(folder: Path, step: int | None, mesh: ParallelMesh, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model of a run or a converted folder over the mesh's tensor-parallel group, ready to compute in `dtype`.

    Each rank reads its slices only. Raises WeightsError, and ValueError where the model cannot be cut that often.
    """
    config, weights, size = stored_model(folder), open_weights(folder, step), mesh.tp_size
    check_head_divisibility(config.num_attention_heads, config.num_key_value_heads, size)
    if config.intermediate_size % size:
        raise ValueError(f"intermediate_size ({config.intermediate_size}) must be divisible by {size} processes")
    with torch.device("meta"):
        model = GPT(config, attention_on_one_device(config, device, dtype))
    shards = apply_tensor_parallel(model, model.tensor_parallel_plan, mesh.tp_group)
    materialize(
        model, shards, lambda name: (0.0, 0.0), seed=0, device=device, dtype=dtype, partition=lambda module: None
    )
    parts = []
    for name, parameter in model.named_parameters():
        shard = shards[name]
        parts.append(Part(name, shard.offsets, parameter.data[tuple(slice(size) for size in shard.sizes)]))
    weights.read([part for part in parts if part.tensor.numel()])
    return model.eval().requires_grad_(False)


def tokenizer_of(folder: Path) -> Encoder:
    """That of the tokens that the weights in `folder` were trained on. Raises WeightsError."""
    beside = folder / COMPANION_FOLDER / "tokenizer.json"
    configured = str(beside)
    if (folder / RUN_FILE).is_file():
        configured = JobConfig.of_run(folder).data.tokenizer
    try:
        return encoder_of(configured)
    except CorpusError as error:
        if beside.is_file() and configured != str(beside):
            return encoder_of(str(beside))
        raise WeightsError(f"{error}; put the tokenizer there that the model in {folder} was trained with") from error


def end_tokens(folder: Path) -> frozenset[int]:
    """Tokens that end a text, by the Hugging Face files beside the weights; none where nothing says."""
    for name in ("generation_config.json", "config.json"):
        path = folder / COMPANION_FOLDER / name
        if path.is_file():
            ids: Any = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
