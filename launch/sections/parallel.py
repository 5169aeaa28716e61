"""Section `parallel`, and the rules that are about it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from launch.sections.base import Section
from launch.settings.rules import Job, idle, rule
from parallel.mesh import MeshShape
from parallel.sequence import check_sequence_parallel
from parallel.tensor import check_head_divisibility


class ParallelSection(Section):
    """How the job is spread over processes. The data-parallel size is the number of processes / (tensor_parallel_size x
    context_parallel_size)."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=1_000_000)
    """Ranks that split each layer's heads, inner projections and vocabulary. Keep it inside one node."""
    sequence_parallel: Literal["auto", True, False] = "auto"
    """Split tokens over the tensor-parallel ranks between the layers that tensor parallelism splits (arXiv:2205.05198).
    auto: yes, if tensor_parallel_size divides a context-parallel rank's tokens."""
    context_parallel_size: int = Field(default=1, ge=1, le=1_000_000)
    """Ranks that split each sequence. context_parallel_mode says how they attend."""
    context_parallel_mode: Literal["auto", "heads", "exchange", "ring"] = "auto"
    """exchange: a rank fetches the keys its queries see and attends once. ring: keys travel from rank to rank and
    partial results are merged, which needs memory for only two ranks' keys. heads: as many ranks as divide the KV heads
    of a tensor-parallel rank trade tokens for heads (arXiv:2309.14509); the rest exchange keys. auto: the cheapest by a
    cost model of H200s; it exchanges keys only if those of a layer fit in 1 GiB."""
    context_parallel_graphs: bool = False
    """Replay attention as CUDA graphs. Useful up to about 4,096 tokens a rank, where the host takes longer to issue
    attention than the GPUs to run it. Costs memory for a copy of each layer's inputs and gradients. Only for GPUs of
    one host, without documents."""
    zero_stage: int = Field(default=3, ge=0, le=3)
    """What DeepSpeed shards over dp x cp: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters
    too."""
    gradient_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are summed over dp x cp. bf16 halves that traffic and rounds each sum. At stage 3, and
    on up to four ranks at stage 2, GPUs of one host send gradients in their own type and sum in fp32 either way."""
    overlap_communication: bool = True
    """Reduce gradients, and at stage 3 fetch parameters, while computing."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: keep master weights and moments in host memory and update them there (ZeRO-Offload, arXiv:2101.06840). Needs
    zero_stage 2 or 3."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """cpu: keep this rank's share of the parameters in host memory while they are not gathered (ZeRO-Infinity,
    arXiv:2104.07857). Needs zero_stage 3 and offload_optimizer."""
    secondary_partition_size: int = Field(default=1, ge=1)
    """Number of neighbours in dp x cp, such as those of one node, that share a second copy of the parameters, so that
    the backward pass gathers from them only (hpZ of ZeRO++, arXiv:2306.10209). Must divide dp x cp. 1: no second
    copy."""


@rule("parallel.tensor_parallel_size", "model.num_attention_heads", "model.num_key_value_heads")
def _heads_split_evenly(job: Job) -> None:
    check_head_divisibility(
        job.model.num_attention_heads, job.model.num_key_value_heads, job.parallel.tensor_parallel_size
    )


@rule("parallel.tensor_parallel_size", "model.intermediate_size")
def _inner_projections_split_evenly(job: Job) -> None:
    width, size = job.model.intermediate_size, job.parallel.tensor_parallel_size
    if width % size:
        below = width // size * size
        raise ValueError(
            f"intermediate_size ({width}) must be divisible by tensor_parallel_size ({size}); "
            f"nearest valid widths: {f'{below}, ' if below else ''}{below + size}"
        )


@rule(
    "parallel.sequence_parallel",
    "training.sequence_length",
    "parallel.context_parallel_size",
    "parallel.tensor_parallel_size",
)
def _tokens_split_evenly(job: Job) -> None:
    if job.parallel.sequence_parallel is True:
        check_sequence_parallel(
            job.training.sequence_length, job.parallel.context_parallel_size, job.parallel.tensor_parallel_size
        )


@rule("parallel.tensor_parallel_size", "parallel.context_parallel_size")
def _mesh_fits_the_world(job: Job) -> None:
    if job.world_size is not None:
        MeshShape.fit(job.world_size, job.parallel.tensor_parallel_size, job.parallel.context_parallel_size)


@rule("parallel.offload_optimizer", "parallel.zero_stage")
def _offloaded_states_are_shared(job: Job) -> None:
    if job.parallel.offload_optimizer != "none" and job.parallel.zero_stage < 2:
        raise ValueError(
            f"offload_optimizer is {job.parallel.offload_optimizer}, which needs zero_stage 2 or 3 (here "
            f"{job.parallel.zero_stage}): whole gradients would stay on the device; set parallel.zero_stage=2 or "
            "parallel.offload_optimizer=none"
        )


@rule("parallel.offload_parameters", "parallel.offload_optimizer", "parallel.zero_stage")
def _offloaded_parameters_are_partitioned(job: Job) -> None:
    if job.parallel.offload_parameters == "none":
        return
    if job.parallel.zero_stage < 3 or job.parallel.offload_optimizer == "none":
        raise ValueError(
            f"offload_parameters is {job.parallel.offload_parameters}, which needs zero_stage 3 (here "
            f"{job.parallel.zero_stage}) and offload_optimizer cpu (here {job.parallel.offload_optimizer}); set both, "
            "or parallel.offload_parameters=none"
        )


@rule(
    "parallel.secondary_partition_size",
    "parallel.zero_stage",
    "parallel.offload_parameters",
    "parallel.tensor_parallel_size",
)
def _secondary_partitions_are_whole(job: Job) -> None:
    size, stage, offload = (
        job.parallel.secondary_partition_size,
        job.parallel.zero_stage,
        job.parallel.offload_parameters,
    )
    if size > 1 and (stage < 3 or offload != "none"):
        raise ValueError(
            f"secondary_partition_size ({size}) above 1 needs zero_stage 3 (here {stage}) and offload_parameters none "
            f"(here {offload}), as a second copy of partitioned parameters on the device; set both, or "
            "parallel.secondary_partition_size=1"
        )
    if job.world_size is None or job.world_size % job.parallel.tensor_parallel_size:
        return
    ranks = job.world_size // job.parallel.tensor_parallel_size
    if ranks % size:
        small = [n for n in range(1, math.isqrt(ranks) + 1) if ranks % n == 0]
        valid = sorted({*small, *(ranks // n for n in small)})
        raise ValueError(
            f"secondary_partition_size ({size}) must divide dp x cp ({ranks} ranks here); valid: "
            f"{', '.join(map(str, valid))}"
        )


@rule("parallel.zero_stage", "training.precision")
def _fp16_has_master_weights(job: Job) -> None:
    if job.training.precision == "fp16" and job.parallel.zero_stage == 0:
        raise ValueError(
            "zero_stage (0) must be 1 or more with precision fp16, because DeepSpeed's stage 0 would "
            "accumulate gradients in fp16; set parallel.zero_stage=1 or training.precision=bf16"
        )


@rule("parallel.context_parallel_graphs", "parallel.context_parallel_size", "job.device")
def _graphs_are_of_gpus(job: Job) -> None:
    size = job.parallel.context_parallel_size
    if job.parallel.context_parallel_graphs and size > 1 and job.job.device == "cpu":
        raise ValueError(
            f"context_parallel_graphs is true with context_parallel_size ({size}) on device {job.job.device}, which "
            "has no CUDA graphs; set parallel.context_parallel_graphs=false or job.device=cuda"
        )


@idle("parallel.sequence_parallel")
def _no_layer_is_split(job: Job) -> str | None:
    size = job.parallel.tensor_parallel_size
    if job.parallel.sequence_parallel is True and size == 1:
        return f"tensor_parallel_size ({size}) splits no layer; raise that, or set this to auto"
    return None


@idle("parallel.context_parallel_mode")
def _no_sequence_or_head_is_traded(job: Job) -> str | None:
    size, tp = job.parallel.context_parallel_size, job.parallel.tensor_parallel_size
    if size == 1:
        return f"context_parallel_size ({size}) splits no sequence; raise that, or set this to auto"
    heads = job.model.num_key_value_heads // tp
    if job.parallel.context_parallel_mode == "heads" and math.gcd(heads, size) == 1:
        return (
            f"a rank's num_key_value_heads ({heads}) and context_parallel_size ({size}) have no divisor in common, so "
            "that keys travel and no heads; change that size, or set this to auto, exchange or ring"
        )
    return None


@idle("parallel.context_parallel_graphs")
def _nothing_is_recorded(job: Job) -> str | None:
    size = job.parallel.context_parallel_size
    if size == 1:
        return f"context_parallel_size ({size}) splits no sequence; raise that, or set this to false"
    if job.data.document_mask:
        return (
            "data.document_mask is true, and a graph cannot follow documents, which differ from batch to batch; set "
            "one of them to false"
        )
    return None


@idle("parallel.overlap_communication")
def _nothing_is_overlapped(job: Job) -> str | None:
    stage = job.parallel.zero_stage
    if stage == 0:
        return f"zero_stage ({stage}) reduces gradients after computing in any case; raise that, or leave this out"
    return None


@idle("parallel.secondary_partition_size")
def _second_copy_is_as_far_as_the_first(job: Job) -> str | None:
    size = job.parallel.secondary_partition_size
    if job.world_size is not None and size == job.world_size // job.parallel.tensor_parallel_size:
        return (
            f"dp x cp has no more ranks ({size} here), from which the first copy is gathered too, and a second "
            "one takes memory; lower it, or leave it out"
        )
    return None
