"""Small jobs for two ranks, and a step of theirs."""

from __future__ import annotations

import torch

from launch.config import JobConfig
from parallel.zero import ZeroEngine

ACCUMULATION, LENGTH, HIDDEN, LAYERS, VOCABULARY = 2, 64, 512, 2, 640


def job_of(
    tp: int,
    cp: int,
    stage: int,
    precision: str,
    checkpointing: str = "none",
    mode: str = "auto",
    sequence_parallel: str = "auto",
    tile: int | None = None,
    reduce_dtype: str = "fp32",
) -> JobConfig:
    replicas = 2 // (tp * cp)
    return JobConfig.from_yaml(f"""
model: {{vocab_size: {VOCABULARY}, hidden_size: {HIDDEN}, intermediate_size: 512, num_hidden_layers: {LAYERS},
  num_attention_heads: 4, num_key_value_heads: 2}}
parallel: {{tensor_parallel_size: {tp}, context_parallel_size: {cp}, context_parallel_mode: {mode},
  zero_stage: {stage}, sequence_parallel: {sequence_parallel}, gradient_reduce_dtype: {reduce_dtype}}}
data: {{source: python_stdlib}}
optimizer: {{learning_rate: 1e-3}}
training: {{sequence_length: {LENGTH}, global_batch_size: {ACCUMULATION * replicas}, max_steps: 3,
  precision: {precision}, activation_checkpointing: {checkpointing}, mlp_tile_tokens: {tile or "null"}}}
""")


def one_step(engine: ZeroEngine, length: int) -> None:
    ids = torch.zeros(1, length, dtype=torch.int64)
    for _ in range(ACCUMULATION):
        loss, _ = engine(ids, torch.arange(length)[None], ids, None)
        engine.backward(loss)
    engine.step(1e-3)
