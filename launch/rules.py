"""The rules that join keys of a job, or a job and its world size: all are checked, none stops the rest.

A rule names the keys it reads. It is left out where one of them is already in error, since its verdict would
be about a value that has to change anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launch.continuity import acceptable, acceptable_keys
from launch.storage import check_client
from launch.violations import Violation
from launch.yaml_strict import KeyPath
from model.kernels import KERNELS
from parallel.mesh import MeshShape
from parallel.sequence import check_sequence_length, check_sequence_parallel
from parallel.tensor import check_head_divisibility

if TYPE_CHECKING:
    from launch.config import ParallelSection, TrainingSection


@dataclass(frozen=True)
class Job:
    """The sections as the rules see them; one that is in error has only its sound keys."""

    sections: Mapping[str, Any]
    world_size: int | None

    def __getattr__(self, name: str) -> Any:
        return self.sections[name]

    def value(self, path: KeyPath) -> object:
        """The value at ("section", "key")."""
        section, key = path
        return getattr(self.sections[str(section)], str(key))


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Rule = Callable[[Job], None]
"""Raises ValueError with both numbers and a remedy."""

_RULES: list[tuple[tuple[KeyPath, ...], Rule]] = []


def violations(
    sections: Mapping[str, Any], broken: frozenset[KeyPath], world_size: int | None = None
) -> list[Violation]:
    """Every broken rule. `broken` holds the ("section", "key") or ("section",) paths already in error."""
    job, found = Job(sections, world_size), []
    for needs, rule in _RULES:
        if any(path in broken or path[:1] in broken for path in needs):
            continue
        try:
            rule(job)
        except ValueError as error:
            found.append(Violation(needs[0], str(error), job.value(needs[0])))
    return found


def tokens_per_step(training: TrainingSection) -> int:
    """Tokens of one optimizer step, all ranks together."""
    return training.global_batch_size * training.sequence_length


def total_steps(training: TrainingSection) -> int:
    """Optimizer steps until max_steps or max_tokens is reached, whichever comes first."""
    limits = [training.max_steps] if training.max_steps is not None else []
    if training.max_tokens is not None:
        limits.append(-(-training.max_tokens // tokens_per_step(training)))
    return min(limits)


def slurm_seconds(limit: str) -> int:
    """Seconds of a time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sequence_parallel(parallel: ParallelSection, training: TrainingSection) -> bool:
    """Whether hidden states are split over tensor-parallel ranks too."""
    if parallel.sequence_parallel != "auto":
        return parallel.sequence_parallel and parallel.tensor_parallel_size > 1
    try:
        check_sequence_parallel(training.sequence_length, parallel.context_parallel_size, parallel.tensor_parallel_size)
    except ValueError:
        return False
    return parallel.tensor_parallel_size > 1


def check_global_batch(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> None:
    """Raises ValueError unless each data-parallel rank gets a whole number of micro batches."""
    unit = micro_batch_size * data_parallel_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        raise ValueError(
            f"global_batch_size ({global_batch_size}) must be divisible by micro_batch_size x "
            f"data_parallel_size ({micro_batch_size} x {data_parallel_size} = {unit}); nearest valid sizes: "
            f"{f'{below}, ' if below else ''}{below + unit}"
        )


def _rule(*needs: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the keys it reads; the first is the one its report points at."""

    def register(rule: Rule) -> Rule:
        _RULES.append((tuple(tuple(need.split(".")) for need in needs), rule))
        return rule

    return register


@_rule("parallel.tensor_parallel_size", "model.num_attention_heads", "model.num_key_value_heads")
def _heads_split_evenly(job: Job) -> None:
    check_head_divisibility(
        job.model.num_attention_heads, job.model.num_key_value_heads, job.parallel.tensor_parallel_size
    )


@_rule("parallel.tensor_parallel_size", "model.intermediate_size")
def _inner_projections_split_evenly(job: Job) -> None:
    width, size = job.model.intermediate_size, job.parallel.tensor_parallel_size
    if width % size:
        below = width // size * size
        raise ValueError(
            f"intermediate_size ({width}) must be divisible by tensor_parallel_size ({size}); "
            f"nearest valid widths: {f'{below}, ' if below else ''}{below + size}"
        )


@_rule("training.sequence_length", "parallel.context_parallel_size")
def _sequence_splits_evenly(job: Job) -> None:
    check_sequence_length(job.training.sequence_length, job.parallel.context_parallel_size)


@_rule(
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


@_rule("training.compile", "parallel.tensor_parallel_size")
def _compiled_blocks_split_no_heads(job: Job) -> None:
    size = job.parallel.tensor_parallel_size
    if job.training.compile is True and size > 1:
        raise ValueError(
            f"compile is true with tensor_parallel_size ({size}) above 1, where gradients come out wrong on GPUs; set "
            "compile to auto or false"
        )


@_rule("parallel.tensor_parallel_size", "parallel.context_parallel_size")
def _mesh_fits_the_world(job: Job) -> None:
    if job.world_size is not None:
        MeshShape.fit(job.world_size, job.parallel.tensor_parallel_size, job.parallel.context_parallel_size)


@_rule(
    "training.global_batch_size",
    "training.micro_batch_size",
    "parallel.tensor_parallel_size",
    "parallel.context_parallel_size",
)
def _global_batch_divides(job: Job) -> None:
    ranks_per_replica = job.parallel.tensor_parallel_size * job.parallel.context_parallel_size
    if job.world_size is None or job.world_size % ranks_per_replica:  # the second is another rule's to report
        data_parallel_size = 1
    else:
        data_parallel_size = job.world_size // ranks_per_replica
    check_global_batch(job.training.global_batch_size, job.training.micro_batch_size, data_parallel_size)


@_rule("data.files", "data.source")
def _source_has_its_files(job: Job) -> None:
    if job.data.source == "files" and not job.data.files:
        raise ValueError("files is empty but source is files; give glob patterns, such as [data/*.txt]")
    if job.data.source != "files" and job.data.files:
        raise ValueError(
            f"files is given but source ({job.data.source}) does not read it; remove files or set source: files"
        )


@_rule("data.blend", "data.source")
def _source_has_its_blend(job: Job) -> None:
    source, blend = job.data.source, job.data.blend
    if source == "indexed" and not blend:
        raise ValueError("blend is empty but source is indexed; list corpora, such as [{path: data/web, weight: 1}]")
    if source != "indexed" and blend:
        raise ValueError(f"blend is given but source ({source}) does not read it; remove it or set source: indexed")
    if blend and not any(corpus.weight for corpus in blend):
        raise ValueError(f"all {len(blend)} weights are 0, so nothing would be read; give one a weight > 0")


@_rule("data.blend")
def _corpora_have_names_of_their_own(job: Job) -> None:
    labels = [corpus.label for corpus in job.data.blend]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"{len(labels)} corpora have {len(set(labels))} names: {', '.join(twice)} comes twice, and a checkpoint "
            "tells corpora apart by name; add name: to one"
        )


@_rule("data.validation_paths", "data.source")
def _validation_paths_are_indexed(job: Job) -> None:
    if job.data.validation_paths and job.data.source != "indexed":
        raise ValueError(
            f"validation_paths is given but source ({job.data.source}) does not read it; remove it, and data."
            "validation_fraction holds a part out, or set source: indexed"
        )


@_rule("training.max_steps", "training.max_tokens")
def _job_ends(job: Job) -> None:
    if job.training.max_steps is None and job.training.max_tokens is None:
        raise ValueError("max_steps and max_tokens are both missing, so the job would never end; give at least one")


@_rule("checkpoint.keep_every", "checkpoint.save_interval")
def _what_is_kept_is_saved(job: Job) -> None:
    every, interval = job.checkpoint.keep_every, job.checkpoint.save_interval
    if every and (not interval or every % interval):
        raise ValueError(
            f"keep_every ({every}) must be a multiple of save_interval ({interval}), or no checkpoint would be at its "
            f"steps; nearest valid: {max(1, round(every / interval)) * interval if interval else 'save_interval > 0'}"
        )


@_rule("slurm.stop_seconds", "slurm.time")
def _a_slice_has_time_to_train(job: Job) -> None:
    if job.slurm.time is None:
        return
    limit, lead = slurm_seconds(job.slurm.time), job.slurm.stop_seconds
    if 0 < limit <= lead:
        raise ValueError(
            f"stop_seconds ({lead}) must be less than the time limit ({job.slurm.time}, {limit} s), or the job is told "
            "to stop as it starts; raise slurm.time or lower slurm.stop_seconds"
        )


@_rule("checkpoint.directory")
def _storage_can_be_reached(job: Job) -> None:
    """Its client is installed; whether the place exists and may be written is seen when the job runs."""
    directory = job.checkpoint.directory
    if directory is None:
        return
    try:
        check_client(directory)
    except (ValueError, ImportError) as error:
        raise ValueError(f"nothing here reads {directory} ({error}); give a path, or install the client") from None


@_rule("checkpoint.accept_changes")
def _changes_can_be_accepted(job: Job) -> None:
    unknown = [key for key in job.checkpoint.accept_changes if not acceptable(key)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no key that a resume refuses; those are {acceptable_keys()}")


@_rule("model.vocab_size", "data.tokenizer", "data.source")
def _bytes_fit_the_vocabulary(job: Job) -> None:
    if job.data.source != "indexed" and job.data.tokenizer == "bytes" and job.model.vocab_size < 256:
        raise ValueError(
            f"vocab_size ({job.model.vocab_size}) must be at least 256 for tokenizer bytes, "
            "which has 256 tokens; raise it or give a tokenizer.json"
        )


@_rule(
    "profile.steps",
    "training.max_steps",
    "training.max_tokens",
    "training.global_batch_size",
    "training.sequence_length",
)
def _traced_steps_are_made(job: Job) -> None:
    if job.profile.steps is None or (job.training.max_steps is None and job.training.max_tokens is None):
        return
    (first, last), total = job.profile.steps, total_steps(job.training)
    if not first <= last <= total:
        raise ValueError(
            f"profile.steps ([{first}, {last}]) must be a first and a last step in order, within the job's steps "
            f"({total}); give for example [{max(1, total - 2)}, {total}]"
        )


@_rule("parallel.offload_optimizer", "parallel.zero_stage")
def _offloaded_states_are_shared(job: Job) -> None:
    if job.parallel.offload_optimizer != "none" and job.parallel.zero_stage < 2:
        raise ValueError(
            f"offload_optimizer is {job.parallel.offload_optimizer}, which needs zero_stage 2 or 3 (here "
            f"{job.parallel.zero_stage}): whole gradients would stay on the device; set parallel.zero_stage=2 or "
            "parallel.offload_optimizer=none"
        )


@_rule("parallel.offload_parameters", "parallel.offload_optimizer", "parallel.zero_stage")
def _offloaded_parameters_are_partitioned(job: Job) -> None:
    if job.parallel.offload_parameters == "none":
        return
    if job.parallel.zero_stage < 3 or job.parallel.offload_optimizer == "none":
        raise ValueError(
            f"offload_parameters is {job.parallel.offload_parameters}, which needs zero_stage 3 (here "
            f"{job.parallel.zero_stage}) and offload_optimizer cpu (here {job.parallel.offload_optimizer}); set both, "
            "or parallel.offload_parameters=none"
        )


@_rule(
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
        raise ValueError(
            f"secondary_partition_size ({size}) must divide data x context ({ranks} ranks here); valid: "
            f"{', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}"
        )


@_rule("training.offload_activations", "training.activation_checkpointing")
def _offloaded_activations_are_few(job: Job) -> None:
    policy = job.training.activation_checkpointing
    if job.training.offload_activations != "none" and policy not in ("attention", "full"):
        raise ValueError(
            f"offload_activations is {job.training.offload_activations}, which needs activation_checkpointing "
            f"attention or full (here {policy}), or more would cross to the host than its link carries; set one of "
            "these, or training.offload_activations=none"
        )


@_rule("training.offload_activations", "parallel.context_parallel_graphs")
def _recordings_stay(job: Job) -> None:
    if job.training.offload_activations != "none" and job.parallel.context_parallel_graphs:
        raise ValueError(
            f"offload_activations is {job.training.offload_activations} with context_parallel_graphs, whose recordings "
            "keep their memory on the device; set one of them to none or false"
        )


@_rule("training.memory_budget_gib", "training.activation_checkpointing")
def _a_budget_is_for_auto(job: Job) -> None:
    budget, policy = job.training.memory_budget_gib, job.training.activation_checkpointing
    if budget is not None and policy != "auto":
        raise ValueError(
            f"memory_budget_gib ({budget:g}) is read by activation_checkpointing auto only (here {policy}); remove it, "
            "or set training.activation_checkpointing=auto"
        )


@_rule("parallel.zero_stage", "training.precision")
def _fp16_has_master_weights(job: Job) -> None:
    if job.training.precision == "fp16" and job.parallel.zero_stage == 0:
        raise ValueError(
            "zero_stage (0) must be 1 or more with precision fp16, because DeepSpeed's stage 0 would "
            "accumulate gradients in fp16; set parallel.zero_stage=1 or training.precision=bf16"
        )


@_rule(
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.decay_fraction",
    "training.max_steps",
    "training.max_tokens",
    "training.global_batch_size",
    "training.sequence_length",
)
def _schedule_fits_the_run(job: Job) -> None:
    if job.training.max_steps is None and job.training.max_tokens is None:
        return  # another rule's to report
    total, warmup = total_steps(job.training), job.optimizer.warmup_steps
    if warmup > total:
        raise ValueError(
            f"warmup_steps ({warmup}) must not exceed the job's steps ({total}); "
            "lower it, or raise training.max_steps or training.max_tokens"
        )
    decay = round(job.optimizer.decay_fraction * total)
    if job.optimizer.schedule == "wsd" and warmup + decay > total:
        raise ValueError(
            f"warmup_steps ({warmup}) and wsd's decay ({job.optimizer.decay_fraction} of {total} steps, {decay}) "
            f"exceed the job's steps ({total}) together; lower warmup_steps to {total - decay} or less, "
            "or lower decay_fraction"
        )


@_rule(
    "model.attention_backend",
    "model.head_dim",
    "model.sliding_window",
    "data.document_mask",
    "job.device",
    "training.precision",
    "training.deterministic",
)
def _named_kernel_takes_the_job(job: Job) -> None:
    """What a kernel declares, not whether this machine has it: the login node need not."""
    backend = job.model.attention_backend
    if backend == "auto":
        return

    def refusal(name: str) -> str | None:
        capabilities = KERNELS[name].capabilities
        device = capabilities.device_types[0] if job.job.device == "auto" else job.job.device
        precision = job.training.precision
        if precision == "auto":
            precision = "bf16" if device == "cuda" else "fp32"
        return capabilities.refusal(
            device_type=device,
            dtype=_DTYPES[precision],
            head_dim=job.model.head_dim,
            window=job.model.sliding_window is not None,
            documents=job.data.document_mask,
            rectangular=job.parallel.context_parallel_size > 1,
            deterministic=job.training.deterministic,
        )

    why_not = refusal(backend)
    if why_not is not None:
        able = [name for name in KERNELS if refusal(name) is None]
        raise ValueError(
            f"attention_backend {backend} cannot run this job: it {why_not}; choose {' or '.join(['auto', *able])}"
        )
