"""Joins model and parallel: from a job and a mesh to an engine that trains.

The order is fixed by memory: shapes on the meta device, the tensor-parallel cut, then one module at a time filled and
(at stage 3) partitioned, so that no rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from launch.config import JobConfig
from launch.context import context_plan
from model.attention import AttentionFunction, KernelAttention
from model.gpt import GPT
from model.kernels import select_kernel
from parallel.exchange import ExchangeAttention
from parallel.materialize import materialize
from parallel.mesh import ParallelMesh
from parallel.ring import RingAttention
from parallel.tensor import TensorShard, apply_tensor_parallel, check_head_divisibility, sum_partial_gradients
from parallel.zero import Precision, ZeroEngine, ZeroSettings, partitioner

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def zero_settings(job: JobConfig, mesh: ParallelMesh, device_type: str) -> ZeroSettings:
    """What ZeRO needs of the job. The device type decides what `precision: auto` means."""
    return ZeroSettings(
        stage=job.parallel.zero_stage,
        precision=job.resolve_precision(device_type),
        micro_batch_size=job.training.micro_batch_size,
        accumulation_steps=job.accumulation_steps(mesh.shape.world_size),
        gradient_clipping=job.training.gradient_clipping,
    )


def build_attention(job: JobConfig, mesh: ParallelMesh, device_type: str) -> tuple[AttentionFunction, str]:
    """The attention seam for this mesh, and a sentence saying which kernel serves it and why."""
    config = job.model
    kernel, reason = select_kernel(
        config.attention_backend,
        device_type=device_type,
        dtype=DTYPES[job.resolve_precision(device_type)],
        head_dim=config.head_dim,
        window=config.sliding_window is not None,
        documents=job.data.document_mask,
        rectangular=mesh.cp_size > 1,
        deterministic=job.training.deterministic,
    )
    deterministic = job.training.deterministic
    if mesh.cp_size == 1:
        return KernelAttention(kernel, config, deterministic=deterministic), reason
    plan = context_plan(job, mesh.shape, DTYPES[job.resolve_precision(device_type)].itemsize)
    assert plan is not None
    attend: AttentionFunction
    if plan.mode == "ring":
        attend = RingAttention(
            mesh.cp_group,
            kernel,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
            deterministic=deterministic,
        )
    else:
        attend = ExchangeAttention(
            mesh.cp_group,
            kernel,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
            deterministic=deterministic,
            keep_gathered=plan.keep_gathered,
        )
    return attend, f"{reason}; {plan.mode} of keys over {mesh.cp_size} ranks: {plan.reason}"


def build_model(job: JobConfig, mesh: ParallelMesh, device: torch.device) -> tuple[GPT, Mapping[str, TensorShard], str]:
    """The model, filled and sharded; what this rank holds of each parameter; and the sentence on attention."""
    config, settings = job.model, zero_settings(job, mesh, device.type)
    check_head_divisibility(config.num_attention_heads, config.num_key_value_heads, mesh.tp_size)
    mesh.warm_up(device)
    attend, attention_note = build_attention(job, mesh, device.type)
    with torch.device("meta"):
        model = GPT(
            config,
            attend,
            activation_checkpointing=job.training.activation_checkpointing == "full",
            mlp_tile_tokens=job.training.mlp_tile_tokens,
        )
    shards = apply_tensor_parallel(
        model, model.tensor_parallel_plan, mesh.tp_group, sequence_parallel=job.sequence_parallel
    )
    # Stage 0 computes bf16 under autocast: its parameters are their own fp32 masters.
    dtype = DTYPES[settings.precision] if settings.stage > 0 else torch.float32
    materialize(
        model,
        shards,
        # Weights that are read later need no random numbers in their place.
        model.initial_distribution if config.init_from is None else lambda name: (0.0, 0.0),
        seed=job.job.seed,
        device=device,
        dtype=dtype,
        partition=partitioner(mesh, settings),
    )
    sum_partial_gradients(model, shards, mesh.tp_group)
    return model, shards, attention_note


def build_engine(job: JobConfig, mesh: ParallelMesh, device: torch.device) -> tuple[ZeroEngine, str]:
    """The model and its optimizer; and the sentence on attention."""
    model, shards, attention_note = build_model(job, mesh, device)
    engine = ZeroEngine(
        model,
        shards,
        mesh,
        zero_settings(job, mesh, device.type),
        betas=job.optimizer.betas,
        eps=job.optimizer.eps,
        weight_decay=job.optimizer.weight_decay,
        device=device,
        units=list(model.layers),
    )
    return engine, attention_note
