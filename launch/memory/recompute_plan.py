"""Which blocks recompute what in the backward pass: as configured, or as little as fits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from launch.config import JobConfig
from launch.memory.footprint import Footprint, footprint
from model.recompute import Recompute
from parallel.mesh import MeshShape

BUDGET_SHARE = 0.9
"""Of a device's memory: the rest is for communication buffers, the allocator's gaps and the device's own context."""
ASSUMED_MEMORY = 80 * 2**30
"""Of a device that nobody has seen, as on a login node."""
_LADDER: tuple[Recompute, ...] = ("none", "selective", "attention", "full")
"""Each computes more again than the one before it, and keeps less."""


@dataclass(frozen=True)
class RecomputePlan:
    """A policy for each block; at most two different ones."""

    policies: tuple[Recompute, ...]
    reason: str = "as configured"

    @property
    def runs(self) -> list[tuple[Recompute, int]]:
        """Each policy, and how many blocks in a row have it."""
        return [(policy, len(list(run))) for policy, run in groupby(self.policies)]

    def __str__(self) -> str:
        runs = self.runs
        if len(runs) == 1:
            return f"{runs[0][0]} in all {len(self.policies)} blocks: {self.reason}"
        (first, count), (rest, others) = runs
        return f"{first} in the first {count} blocks, {rest} in the other {others}: {self.reason}"


def recompute_plan(job: JobConfig, mesh: MeshShape, device: str, device_memory: int | None = None) -> RecomputePlan:
    """`device` is "cpu" or "cuda", `device_memory` its bytes, if it is known."""
    policy, blocks = job.training.activation_checkpointing, job.model.num_hidden_layers
    if policy != "auto":
        return RecomputePlan((policy,) * blocks)
    budget, source = _budget(job, device_memory)
    peaks: dict[tuple[Recompute, ...], int] = {}
    for policies in _candidates(blocks):
        peaks[policies] = footprint(job, mesh, device, policies).peak
        if peaks[policies] <= budget:
            return RecomputePlan(policies, f"estimated peak {_gib(peaks[policies])} of {source}")
    least = min(peaks, key=lambda policies: peaks[policies])
    return RecomputePlan(
        least,
        f"nothing fits: the least peak is {_gib(peaks[least])}, against {source}; shard more (zero_stage, "
        "context_parallel_size, tensor_parallel_size), or set training.mlp_tile_tokens, or offload_activations=cpu"
        " with training.activation_checkpointing=full",
    )


def planned_footprint(job: JobConfig, mesh: MeshShape, device: str, device_memory: int | None = None) -> Footprint:
    """What a rank holds under the plan of the same arguments."""
    return footprint(job, mesh, device, recompute_plan(job, mesh, device, device_memory).policies)


def _candidates(blocks: int) -> Iterator[tuple[Recompute, ...]]:
    """From the least to the most recomputation. The first blocks recompute more: when the backward pass reaches them,
    the others have given back what they kept."""
    yield (_LADDER[0],) * blocks
    for less, more in pairwise(_LADDER):
        for count in range(1, blocks + 1):
            yield (more,) * count + (less,) * (blocks - count)


def _budget(job: JobConfig, device_memory: int | None) -> tuple[float, str]:
    """Bytes, and in words."""
    configured = job.training.memory_budget_gib
    if configured is not None:
        return configured * 2**30, f"memory_budget_gib {configured:g}"
    memory, whose = device_memory, "the device's"
    if memory is None:
        memory, whose = ASSUMED_MEMORY, "an assumed device's"
    return BUDGET_SHARE * memory, f"{_gib(BUDGET_SHARE * memory)}, {BUDGET_SHARE:.0%} of {whose} {_gib(memory)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.4g} GiB"
