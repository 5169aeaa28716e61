"""Section `training`, and the rules that are about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.data.skipped import check_ranges
from launch.precision import check_precision
from launch.sections.base import ListOf, Section, StepRange
from launch.settings.rules import Job, idle, rule
from parallel.sequence import check_sequence_length

OF_TOTAL_STEPS = ("training.max_steps", "training.max_tokens", "training.global_batch_size", "training.sequence_length")
"""The keys that `TrainingSection.ends` and `total_steps` follow from."""


class TrainingSection(Section):
    """Batches, length, precision and evaluation."""

    sequence_length: int = Field(ge=1)
    """Tokens of one sequence, before it is split over context-parallel ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences of one forward pass of one data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Sequences of one optimizer step, all ranks together. Gradient accumulation is derived from it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop at the first step that has seen this many tokens; with max_steps too, whichever comes first."""
    skip_steps: ListOf[StepRange] = ()
    """Steps to leave out, as after a spike of the loss: [[1001, 1200]] neither reads the data of steps 1001 to 1200 nor
    updates the weights. The steps keep their numbers in the log, the schedule and the limits above, and every other
    step reads what it would have read. May change at a resume, for steps that are still to come."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs. fp16 adds loss scaling."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the whole model's gradient; 0 leaves gradients alone."""
    activation_checkpointing: Literal["auto", "none", "selective", "attention", "full"] = "none"
    """What a block recomputes in the backward pass to save memory. none: nothing. selective: norms, rotation and
    activation, but no matrix product and no attention. attention: everything except attention (and its messages). full:
    everything, from the block's input. auto: the least that fits in memory by the estimate of --check; the first blocks
    may have another policy than the rest."""
    memory_budget_gib: float | None = Field(default=None, gt=0)
    """Memory of one rank, in GiB, that activation_checkpointing auto may fill; null: 90 % of the device's memory."""
    offload_activations: Literal["none", "cpu"] = "none"
    """cpu: move the activations that blocks keep (their input, and attention's output) to host memory, and fetch them
    one block ahead in the backward pass. For very long sequences; needs activation_checkpointing attention or full."""
    compile: Literal["auto", True, False] = "auto"
    """Compile transformer blocks with torch.compile, around attention. auto: on GPUs, unless mlp_tile_tokens is set."""
    mlp_tile_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one rank that a feed-forward layer computes at a time, and again in the backward pass, so that its
    inner tensors never exist whole. For very long sequences. null: all at once."""
    evaluation_interval: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates only at the end."""
    evaluation_batches: int = Field(default=8, ge=1)
    """Global batches of one evaluation."""
    deterministic: bool = False
    """Make torch and the attention kernel give bitwise repeatable results, at some cost in speed."""
    sample_tokens: int = Field(default=0, ge=0)
    """Tokens of the sample that the trained model writes at the end; 0 writes none."""
    sample_prompt: str = ""
    """What the sample starts from."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, all ranks together."""
        return self.global_batch_size * self.sequence_length

    @property
    def ends(self) -> bool:
        """Whether there are total_steps; else a rule refuses the job."""
        return self.max_steps is not None or self.max_tokens is not None

    @property
    def total_steps(self) -> int:
        """Optimizer steps until max_steps or max_tokens is reached, whichever comes first."""
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.max_tokens is not None:
            limits.append(-(-self.max_tokens // self.tokens_per_step))
        return min(limits)


def check_global_batch(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> None:
    """Raises ValueError unless each data-parallel rank gets a whole number of micro-batches."""
    unit = micro_batch_size * data_parallel_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        raise ValueError(
            f"global_batch_size ({global_batch_size}) must be divisible by micro_batch_size x "
            f"data_parallel_size ({micro_batch_size} x {data_parallel_size} = {unit}); nearest valid sizes: "
            f"{f'{below}, ' if below else ''}{below + unit}"
        )


@rule("training.sequence_length", "parallel.context_parallel_size")
def _sequence_splits_evenly(job: Job) -> None:
    check_sequence_length(job.training.sequence_length, job.parallel.context_parallel_size)


@rule(
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


@rule("training.max_steps", "training.max_tokens")
def _job_ends(job: Job) -> None:
    if not job.training.ends:
        raise ValueError("max_steps and max_tokens are both missing, so the job would never end; give at least one")


@rule("training.skip_steps", *OF_TOTAL_STEPS)
def _skipped_steps_lie_in_the_run(job: Job) -> None:
    skipped = job.training.skip_steps
    check_ranges(skipped)
    if skipped and job.training.ends and skipped[-1][1] >= job.training.total_steps:
        raise ValueError(
            f"skip_steps ends with {[*skipped[-1]]}, but the job's last step ({job.training.total_steps}) must be "
            "made; leave that range out, or change max_steps or max_tokens"
        )


@rule("training.precision", "job.device")
def _the_device_computes_in_it(job: Job) -> None:
    if job.training.precision != "auto":
        check_precision(job.training.precision, job.job.device)


@rule("training.offload_activations", "training.activation_checkpointing")
def _offloaded_activations_are_few(job: Job) -> None:
    policy = job.training.activation_checkpointing
    if job.training.offload_activations != "none" and policy not in ("attention", "full"):
        raise ValueError(
            f"offload_activations is {job.training.offload_activations}, which needs activation_checkpointing "
            f"attention or full (here {policy}), or more would cross to the host than its link carries; set one of "
            "these, or training.offload_activations=none"
        )


@rule("training.offload_activations", "parallel.context_parallel_graphs")
def _recordings_stay(job: Job) -> None:
    if job.training.offload_activations != "none" and job.parallel.context_parallel_graphs:
        raise ValueError(
            f"offload_activations is {job.training.offload_activations} with context_parallel_graphs, whose recordings "
            "keep their memory on the device; set one of them to none or false"
        )


@rule("training.memory_budget_gib", "training.activation_checkpointing")
def _a_budget_is_for_auto(job: Job) -> None:
    budget, policy = job.training.memory_budget_gib, job.training.activation_checkpointing
    if budget is not None and policy != "auto":
        raise ValueError(
            f"memory_budget_gib ({budget:g}) is read by activation_checkpointing auto only (here {policy}); remove it, "
            "or set training.activation_checkpointing=auto"
        )


@idle("training.mlp_tile_tokens")
def _one_tile_holds_all(job: Job) -> str | None:
    tile, size = job.training.mlp_tile_tokens, job.parallel.context_parallel_size
    tokens = job.training.micro_batch_size * job.training.sequence_length // size
    if tile is not None and tile >= tokens:
        uncompiled = ", and keeps compile auto from compiling them" if job.training.compile == "auto" else ""
        return (
            f"a rank's micro-batch has {tokens} tokens, which layers compute at once{uncompiled}; lower it, or leave "
            "it out"
        )
    return None


@idle("training.sample_prompt")
def _no_sample_is_written(job: Job) -> str | None:
    tokens = job.training.sample_tokens
    if tokens == 0:
        return f"sample_tokens ({tokens}) writes no sample; raise that, or leave this out"
    return None
