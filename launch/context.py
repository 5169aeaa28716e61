"""How a job's context parallelism attends: by heads, by exchange or in a ring, and what the choice holds in memory.

P context_parallel_size = U x R: U ranks trade heads, R trade keys. H query and K key/value heads of one tensor-parallel
rank, D head_dim, t tokens of one micro batch on one rank, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.config import JobConfig
from parallel.exchange_plan import buffer_room, exchange_plan, one_call_is_faster
from parallel.mesh import MeshShape

_EXCHANGE_BYTES = 2**30
"""Largest buffer of one layer's fetched keys and values for which `auto` exchanges."""
_TOKENS_PER_HEAD_GROUP = 4096
"""With fewer tokens a rank for each group of heads, a group's kernel is too short to hide the next one's way."""


@dataclass(frozen=True)
class ContextPlan:
    """The mode and why, and what the busiest rank holds during one layer's attention."""

    by_heads: int
    """U: ranks that trade heads for tokens."""
    by_keys: int
    """R: ranks among which keys travel, by exchange or in a ring."""
    keys: Literal["exchange", "ring"]
    fetched_tokens: int
    """M: tokens whose keys an exchanging rank holds, its own among them, of all rows of a micro batch; with room
    for some twice where one call serves both chunks."""
    traffic: int
    """Bytes that the busiest rank receives in one layer's forward and backward."""
    head_groups: int
    """Groups that a rank's heads travel in, one while another is computed."""
    reason: str = ""
    spare_memory: bool = True
    """Layers may keep what they fetched for the backward pass."""

    @property
    def balanced(self) -> bool:
        """Sequences are cut so that ranks have equal work: an exchange of keys alone can do without the zigzag."""
        return self.keys == "exchange" and self.by_heads == 1

    @property
    def keep_gathered(self) -> bool:
        """Fetched keys stay for the backward pass: with two ranks they are at most twice a rank's own. With more, and
        inside an exchange of heads, they are fetched again."""
        return self.keys == "exchange" and self.by_keys == 2 and self.by_heads == 1 and self.spare_memory

    @property
    def mode(self) -> str:
        """In words."""
        parts = [f"heads over {self.by_heads}"] * (self.by_heads > 1) + [f"{self.keys} of keys over {self.by_keys}"] * (
            self.by_keys > 1
        )
        return " around ".join(parts) + " ranks"


def context_plan(job: JobConfig, mesh: MeshShape, bytes_per_number: int) -> ContextPlan | None:
    """None without context parallelism.

    `auto` takes the split that receives the fewest bytes. Documents are not known here: they only make exchanges
    smaller.
    """
    size, configured = mesh.context_parallel_size, job.parallel.context_parallel_mode
    if size == 1:
        return None
    kv_heads = job.model.num_key_value_heads // mesh.tensor_parallel_size
    splits = [ranks for ranks in range(1, size + 1) if size % ranks == 0 and kv_heads % ranks == 0]
    if configured == "heads":
        splits = splits[-1:]
    elif configured != "auto":
        splits = [1]
    plans = [_plan(job, mesh, bytes_per_number, by_heads) for by_heads in splits]
    return min(plans, key=lambda plan: plan.traffic)


def _plan(job: JobConfig, mesh: MeshShape, width: int, by_heads: int) -> ContextPlan:
    length, rows, configured = (
        job.training.sequence_length,
        job.training.micro_batch_size,
        job.parallel.context_parallel_mode,
    )
    by_keys = mesh.context_parallel_size // by_heads
    query_heads = job.model.num_attention_heads // mesh.tensor_parallel_size
    kv_heads = job.model.num_key_value_heads // mesh.tensor_parallel_size
    pair = 2 * kv_heads // by_heads * job.model.head_dim * width  # bytes of one token's keys and values
    own = rows * length // by_keys
    spare_memory = job.training.offload_activations == "none"
    joined = (rows == 1 or job.data.document_mask) and one_call_is_faster(query_heads // by_heads, length // by_keys)
    exchanges = [exchange_plan(length, by_keys, rank, job.model.sliding_window) for rank in range(by_keys)]
    fetched = rows * max(plan.buffer_length for plan in exchanges)
    if joined and by_keys > 1:
        fetched = rows * buffer_room(length, by_keys, joined)
    keys: Literal["exchange", "ring"] = "exchange"
    if configured == "ring" or (configured != "exchange" and fetched * pair > _EXCHANGE_BYTES):
        keys = "ring"
    if by_keys == 1:
        traffic = 0
    elif keys == "exchange":  # there, home again, and there once more if they were not kept
        received = rows * max(plan.received_tokens for plan in exchanges)
        traffic = received * pair * (2 if by_keys == 2 and by_heads == 1 and spare_memory else 3)
    else:  # twice P - 1 hops with keys, and P hops with their gradients in fp32
        traffic = own * pair * (2 * (by_keys - 1) + by_keys * 4 // width)
    tokens = rows * length // mesh.context_parallel_size
    traffic += tokens * (by_heads - 1) // by_heads * 4 * (query_heads + kv_heads) * job.model.head_dim * width
    groups = max(1, min(3, kv_heads // by_heads, tokens // _TOKENS_PER_HEAD_GROUP))
    reason = "as configured"
    if configured == "auto":
        reason = f"a layer receives {traffic / 2**20:,.1f} MiB"
        if by_keys > 1:
            within = "within" if keys == "exchange" else "beyond"
            reason += (
                f", its fetched keys and values take {fetched * pair / 2**20:,.1f} MiB, {within} the "
                f"{_EXCHANGE_BYTES // 2**20:,} of auto"
            )
    groups = groups if by_heads > 1 else 1
    return ContextPlan(by_heads, by_keys, keys, fetched, traffic, groups, reason, spare_memory)
