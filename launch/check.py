"""The report of `--check`: which rank does what, and how much memory that takes. Needs no process group and no GPU."""

from __future__ import annotations

from pathlib import Path

from launch.config import JobConfig
from launch.context_plan import ContextPlan, context_plan
from launch.data.skipped import in_words, steps_skipped
from launch.memory.footprint import footprint, local_tokens
from launch.memory.formulas import (
    EXCHANGE_FORMULA,
    HEAD_FORMULA,
    HEADS_FORMULA,
    RING_FORMULA,
    Activations,
    States,
    block_formula,
    host_copies,
    kept_formula,
)
from launch.memory.parameters import count_parameters
from launch.memory.recompute_plan import RecomputePlan, recompute_plan
from launch.plurals import counted
from launch.precision import BYTES
from launch.weights.suitability import notes_on
from model.kernels.linear_cross_entropy import chunk_tokens
from parallel.mesh import MeshShape
from parallel.vocab import padded_vocabulary
from parallel.zero_config import LIVE_PARAMETERS

_MOST_LINES, _MOST_RANKS = 16, 64
"""Of the list of ranks; the rest follows by rule."""


def layout_report(
    job: JobConfig, world_size: int, device_type: str | None = None, device_memory: int | None = None
) -> str:
    """The layout of `job` on `world_size` processes, as text. Raises ValueError where they do not fit.

    Without `device_type` ("cpu" or "cuda") it is what job.device names, and GPUs where that is auto. `device_memory`:
    bytes of one device, if known.
    """
    mesh = job.mesh_shape(world_size)
    device = device_type or ("cuda" if job.job.device == "auto" else job.job.device)
    plan = recompute_plan(job, mesh, device, device_memory)
    sections = [
        [f"job {job.job.name}: valid on {counted(world_size, 'process', 'processes')}"],
        _ranks(mesh),
        _work(job, mesh, device, plan),
        _memory(job, mesh, device, plan),
    ]
    if idle := job.idle_keys(world_size):
        sections.append(["without effect", *(f"  {line}" for line in idle)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def planned_world_size(job: JobConfig) -> tuple[int, str]:
    """How many processes `job` is meant for, and why: what its slurm section asks for, else one model replica."""
    slurm, tp, cp = job.slurm, job.parallel.tensor_parallel_size, job.parallel.context_parallel_size
    if slurm.model_fields_set:
        size = slurm.processes
        reason = f"slurm.nodes ({slurm.nodes}) x slurm.gpus_per_node ({slurm.gpus_per_node})"
    else:
        size = tp * cp
        reason = f"tensor_parallel_size ({tp}) x context_parallel_size ({cp}), as the job has no slurm section"
    return size, f"{counted(size, 'process', 'processes')}, {reason}"


def _ranks(mesh: MeshShape) -> list[str]:
    """One line per tensor-parallel group."""
    size = mesh.tensor_parallel_size
    lines = [
        f"mesh: {mesh}; rank = (dp * {mesh.context_parallel_size} + cp) * {size} + tp",
        f"  {'dp':>4} {'cp':>4}   {'rank' if size == 1 else f'ranks of tp 0 to {size - 1}'}",
    ]
    listed = min(mesh.world_size, size * max(1, min(_MOST_LINES, _MOST_RANKS // size)))
    for first in range(0, listed, size):
        _, cp, dp = mesh.coordinates(first)
        lines.append(f"  {dp:>4} {cp:>4}   {' '.join(str(first + tp) for tp in range(size))}")
    if listed < mesh.world_size:
        lines.append(f"  ... and so on to rank {mesh.world_size - 1}")
    return lines


def _work(job: JobConfig, mesh: MeshShape, device: str, plan: RecomputePlan) -> list[str]:
    model, training, tp = job.model, job.training, mesh.tensor_parallel_size
    accumulation = job.accumulation_steps(mesh.world_size)
    local_length = training.sequence_length // mesh.context_parallel_size
    parameters, local = count_parameters(model), count_parameters(model, tp)
    padded = padded_vocabulary(model.vocab_size, tp)
    skipped = steps_skipped(training.skip_steps, 0, job.total_steps)
    made = job.total_steps - sum(map(len, skipped))
    rows = {
        "heads per rank": f"{model.num_attention_heads // tp} query, {model.num_key_value_heads // tp} key/value "
        f"(of {model.num_attention_heads} and {model.num_key_value_heads}), head_dim {model.head_dim}",
        "tokens per rank": f"{local_tokens(job, mesh):,} in a micro-batch: "
        f"{counted(training.micro_batch_size, 'sequence')} x {local_length:,} of {training.sequence_length:,} tokens",
        "hidden states": f"{local_tokens(job, mesh) // (tp if job.sequence_parallel else 1):,} of these tokens",
        "accumulation": f"{counted(accumulation, 'micro-batch', 'micro-batches')} x "
        f"{counted(training.micro_batch_size, 'sequence')} x dp {mesh.data_parallel_size} = "
        f"{counted(training.global_batch_size, 'sequence')}, {job.tokens_per_step:,} tokens a step",
        "length": f"{counted(made, 'step')}, {made * job.tokens_per_step:,} tokens",
        "parameters": f"{parameters:,}; {local:,} on one tensor-parallel rank",
        "vocabulary": f"{model.vocab_size:,}"
        + (f", padded to {padded:,} for tp {tp}" if padded > model.vocab_size else ", no padding"),
        "precision": _precision_note(job, device),
        "attention": _attention_note(job, mesh, device),
    }
    if skipped:
        rows["skipped"] = f"{in_words(skipped)} of {job.total_steps:,}: no rank reads their data"
    if job.training.activation_checkpointing == "auto":
        rows["recomputation"] = str(plan)
    if model.init_from is not None:
        rows["initial weights"] = model.init_from + notes_on(job, Path(model.init_from))
    return [f"{name:<16} {text}" for name, text in rows.items()]


def _memory(job: JobConfig, mesh: MeshShape, device: str, plan: RecomputePlan) -> list[str]:
    tp, stage, precision = mesh.tensor_parallel_size, job.parallel.zero_stage, job.resolve_precision(device)
    zero_size = mesh.data_parallel_size * mesh.context_parallel_size
    local = count_parameters(job.model, tp)
    whole = footprint(job, mesh, device, plan.policies)
    states, activations = whole.states, whole.activations
    rows = _state_rows(job, states, zero_size)
    if stage == 3:
        rows.append(("gathered", whole.working, f"at most {LIVE_PARAMETERS:,} parameters whole at a time"))
    elif whole.working:
        rows.append(("autocast copies", whole.working, "bf16 copies of the fp32 parameters"))
    if states.host:
        rows.append(("offloaded", states.host, "what of these is in host memory, not part of the peak"))
    peak = whole.peak
    rows += _activation_rows(job, device, activations, plan, context_plan(job, mesh, BYTES[precision]))
    copies, on_gpus = host_copies(local, stage, zero_size) * job.checkpoint.asynchronous, device != "cpu"
    saving = ("host copies", copies, _copies_note(stage, zero_size))
    if copies and not on_gpus:
        rows.append(saving)
        peak += copies
    unit, unit_name = (2**30, "GiB") if peak >= 2**30 else (2**20, "MiB")

    def row(name: str, size: int, note: str) -> str:
        return f"  {name:<16} {size / unit:>8.2f}   {note}"

    return [
        f"memory of one rank, {precision}, ZeRO-{stage} over {counted(zero_size, 'rank')}, in {unit_name}",
        *(row(*one) for one in rows),
        f"  {'peak':<16} {peak / unit:>8.2f}   states ({states.on_device / unit:.2f}) and activations, "
        "with the larger of the head's and one block's work",
        *([row(*saving) + "; not on the GPU"] if copies and on_gpus else []),
        f"  t = {local_tokens(job, mesh):,} tokens, b = {BYTES[precision]} bytes; the letters count one rank's share.",
        "  Left out: communication buffers, the allocator's gaps, the device's own context; with the math kernel,",
        "  its scores of t x sequence_length per head.",
    ]


def _state_rows(job: JobConfig, states: States, zero_size: int) -> list[tuple[str, int, str]]:
    parallel, stage = job.parallel, job.parallel.zero_stage
    away = {"cpu": ", in host memory", "none": ""}
    parameters_at, optimizer_at = away[parallel.offload_parameters], away[parallel.offload_optimizer]
    again = parallel.secondary_partition_size
    second = f", and 1/{again} again (secondary_partition_size)" if again > 1 else ""
    masters = _shared(True, zero_size) if stage else "none: the parameters are fp32"
    return [
        ("parameters", states.parameters, f"{_shared(stage >= 3, zero_size)}{parameters_at}{second}"),
        ("gradients", states.gradients, f"{_shared(stage >= 2, zero_size)}{optimizer_at}"),
        ("master weights", states.master_weights, f"{masters}{optimizer_at}"),
        ("Adam moments", states.moments, f"{_shared(stage >= 1, zero_size)}{optimizer_at}"),
    ]


def _activation_rows(
    job: JobConfig, device: str, activations: Activations, plan: RecomputePlan, context: ContextPlan | None
) -> list[tuple[str, int, str]]:
    compiled = job.compiles(device)
    block = block_formula(job.model.qk_norm, job.sequence_parallel, activations.tile > 0, compiled)
    tp = job.parallel.tensor_parallel_size
    by_policy = [
        block if policy == "none" else kept_formula(policy, compiled, tp > 1) for policy in dict.fromkeys(plan.policies)
    ]
    kept = f"{counted(job.model.num_hidden_layers, 'block')}, each {' or '.join(by_policy)}"
    if job.training.offload_activations == "none":
        rows = [("activations", activations.kept, kept)]
    else:
        rows = [("offloaded", activations.host, f"to host memory, not part of the peak: {kept}")]
        rows.append(("activations", activations.kept, "of two of these blocks"))
    if activations.recomputed:
        rows.append(("recomputation", activations.recomputed, f"one block, {block}"))
    chunk = chunk_tokens(padded_vocabulary(job.model.vocab_size, tp) // tp)
    rows.append(("head", activations.head, f"{HEAD_FORMULA}, c = min(t, {chunk:,})"))
    if activations.tile:
        rows.append(("tile", activations.tile, f"4 F b of {job.training.mlp_tile_tokens:,} tokens"))
    if context is not None:
        formulas = [HEADS_FORMULA] * (context.by_heads > 1)
        if context.by_keys > 1:
            exchange = f"{EXCHANGE_FORMULA}, M = {context.fetched_tokens:,}"
            formulas.append(RING_FORMULA if context.keys == "ring" else exchange)
        rows.append(("attention", activations.context, f"one block, {' + '.join(formulas)}"))
    return rows


def _precision_note(job: JobConfig, device: str) -> str:
    precision = job.resolve_precision(device)
    if job.training.precision != "auto":
        return precision
    if job.job.device == "auto":
        return f"auto: bf16 on GPUs, fp32 on CPUs; {precision} below"
    return f"auto: {precision} on {'GPUs' if device == 'cuda' else 'CPUs'}"


def _attention_note(job: JobConfig, mesh: MeshShape, device: str) -> str:
    backend = job.model.attention_backend
    kernel = "auto: the fastest that the nodes have, named when the job starts" if backend == "auto" else backend
    extras = []
    if job.model.sliding_window is not None:
        full = len(set(job.model.full_attention_layers))
        extras.append(f"window {job.model.sliding_window:,}" + (f", none in {counted(full, 'block')}" if full else ""))
    if job.data.document_mask:
        extras.append("documents apart")
    context = context_plan(job, mesh, BYTES[job.resolve_precision(device)])
    if context is not None:
        extras.append(f"{context.mode}: {context.reason}")
    return "; ".join([kernel, *extras])


def _copies_note(stage: int, zero_size: int) -> str:
    where = " on the first rank of dp x cp" if stage == 0 and zero_size > 1 else ""
    return f"host memory of asynchronous saves{where}: fp32 weights and moments"


def _shared(shared: bool, zero_size: int) -> str:
    return f"1/{zero_size} of the tensor-parallel rank's" if shared and zero_size > 1 else "whole"
