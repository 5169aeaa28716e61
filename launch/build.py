"""Joins model and parallel: from a job and a mesh to an engine that trains.

The order is fixed by memory: shapes on the meta device, the tensor-parallel cut, then one module at a time filled and
(at stage 3) partitioned, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from launch.config import JobConfig
from launch.context_plan import ContextPlan, context_plan
from launch.memory.recompute_plan import recompute_plan
from launch.precision import BYTES, DTYPES
from model.attention import AttentionFunction, attention_of_blocks, kernel_attention
from model.gpt import GPT
from model.kernels import AttentionKernel, AttentionOperator, KernelOperator, KernelUnavailable, select_kernel
from parallel.activation_offload import ActivationOffload
from parallel.cuda_graphs import RecordedAttention
from parallel.exchange import ExchangeAttention
from parallel.materialize import materialize
from parallel.mesh import ParallelMesh
from parallel.ring import RingAttention
from parallel.tensor import TensorShard, apply_tensor_parallel, check_head_divisibility, sum_partial_gradients
from parallel.transport import SymmetricTransport, Transport, make_transport
from parallel.ulysses import UlyssesAttention
from parallel.zero import ZeroEngine, partitioner
from parallel.zero_config import ZeroSettings
from parallel.zero_inference import InferenceEngine


def zero_settings(job: JobConfig, mesh: ParallelMesh, device_type: str) -> ZeroSettings:
    """What ZeRO needs of the job. The device type decides what `precision: auto` means."""
    return ZeroSettings(
        stage=job.parallel.zero_stage,
        precision=job.resolve_precision(device_type),
        micro_batch_size=job.training.micro_batch_size,
        accumulation_steps=job.accumulation_steps(mesh.shape.world_size),
        gradient_clipping=job.training.gradient_clipping,
        reduce_dtype=job.parallel.gradient_reduce_dtype,
        overlap=job.parallel.overlap_communication,
        offload_optimizer=job.parallel.offload_optimizer,
        offload_parameters=job.parallel.offload_parameters,
        secondary_partition_size=job.parallel.secondary_partition_size,
    )


def build_attention(job: JobConfig, mesh: ParallelMesh, device: torch.device) -> tuple[list[AttentionFunction], str]:
    """Each block's attention function for this mesh, and a sentence that says which kernel it uses and why."""
    config = job.model
    kernel, reason = select_kernel(
        config.attention_backend,
        device_type=device.type,
        dtype=DTYPES[job.resolve_precision(device.type)],
        head_dim=config.head_dim,
        window=config.sliding_window is not None,
        documents=job.data.document_mask,
        rectangular=mesh.cp_size > 1,
        deterministic=job.training.deterministic,
    )
    if mesh.cp_size == 1:
        return kernel_attention(kernel, config, deterministic=job.training.deterministic), reason
    plan = context_plan(job, mesh.shape, BYTES[job.resolve_precision(device.type)])
    assert plan is not None
    attention, transport_note = context_attention(job, plan, mesh, kernel, device)
    return attention, f"{reason}; {plan.mode}, {transport_note}: {plan.reason}"


def context_attention(
    job: JobConfig, plan: ContextPlan, mesh: ParallelMesh, kernel: AttentionKernel, device: torch.device
) -> tuple[list[AttentionFunction], str]:
    """Each block's operator as `plan` describes it, and how its ranks reach each other. Collective over the mesh."""
    config, recorded = job.model, job.parallel.context_parallel_graphs
    by_heads, by_keys = mesh.split_context(plan.by_heads, device)

    def transports() -> tuple[Transport, Transport]:
        """For keys and for heads. All blocks share them: they attend one after the other."""
        of_keys = make_transport(by_keys, device)
        return of_keys, make_transport(by_heads, device) if plan.by_heads > 1 else of_keys

    def operator(window: int | None, of_keys: Transport, of_heads: Transport) -> AttentionOperator:
        attend: AttentionOperator
        settings: dict[str, Any] = {
            "scale": config.head_dim**-0.5,
            "window": window,
            "deterministic": job.training.deterministic,
        }
        if plan.by_keys == 1:
            attend = KernelOperator(kernel, **settings)
        elif plan.keys == "ring":
            attend = RingAttention(by_keys, kernel, **settings)
        else:
            attend = ExchangeAttention(
                of_keys,
                kernel,
                balanced=plan.balanced,
                cut_by_window=config.widest_window == window,
                keep_gathered=plan.keep_gathered,
                **settings,
            )
        return UlyssesAttention(of_heads, attend, head_groups=plan.head_groups) if plan.by_heads > 1 else attend

    plain = transports()
    name = plain[1].name
    if not recorded:
        return attention_of_blocks(config, lambda window: operator(window, *plain)), name
    if not isinstance(plain[1], SymmetricTransport):
        raise KernelUnavailable(
            "parallel.context_parallel_graphs needs GPUs of one host that can read each other's memory; set it to false"
        )
    in_graphs = transports()
    return attention_of_blocks(
        config, lambda window: RecordedAttention(operator(window, *plain), operator(window, *in_graphs))
    ), f"{name}, in CUDA graphs"


def device_memory(device: torch.device) -> int:
    """Bytes of the smallest device of the job; on CPUs a rank's share of the smallest host. Collective."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // dist.get_world_size()
    least = torch.tensor(memory, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def build_model(
    job: JobConfig, mesh: ParallelMesh, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[GPT, Mapping[str, TensorShard], str]:
    """The model, filled and sharded; what this rank holds of each parameter; and a note on attention and on what is
    recomputed.

    `dtype` is that of the parameters; None is what training keeps: at stage 0 fp32 masters, computed with under
    autocast.
    """
    config, settings = job.model, zero_settings(job, mesh, device.type)
    check_head_divisibility(config.num_attention_heads, config.num_key_value_heads, mesh.tp_size)
    mesh.warm_up(device)
    attention, note = build_attention(job, mesh, device)
    plan = recompute_plan(job, mesh.shape, device.type, device_memory(device))
    if job.training.activation_checkpointing == "auto":
        note += f"; recomputation: {plan}"
    with torch.device("meta"):
        model = GPT(
            config,
            attention,
            recompute=plan.policies,
            mlp_tile_tokens=job.training.mlp_tile_tokens,
            store=None if job.training.offload_activations == "none" else ActivationOffload(device),
        )
    shards = apply_tensor_parallel(
        model, model.tensor_parallel_plan, mesh.tp_group, sequence_parallel=job.sequence_parallel
    )
    if dtype is None:
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
    if job.compiles(device.type):
        # ZeRO's hooks sit on the call of a block, outside of what is compiled: its parameters are whole in there. A
        # torch that compiles for each block by itself must not run into its limit.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(model.layers))
        model.compile_blocks()
    return model, shards, note


def build_engine(job: JobConfig, mesh: ParallelMesh, device: torch.device) -> tuple[ZeroEngine, str]:
    """The model and its optimizer; and the note of `build_model`."""
    model, shards, note = build_model(job, mesh, device)
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
    return engine, note


def build_inference(job: JobConfig, mesh: ParallelMesh, device: torch.device) -> InferenceEngine:
    """The model alone, on the job's layout, in the type that it computes in."""
    settings = zero_settings(job, mesh, device.type)
    model, shards, _ = build_model(job, mesh, device, DTYPES[settings.precision])
    return InferenceEngine(model, shards, mesh, settings, units=list(model.layers))
