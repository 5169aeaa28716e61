"""Chooses how a job's context parallelism attends (by heads, by exchange or in a ring), and what that holds in memory.

P context_parallel_size = U x R: U ranks trade heads, R trade keys. H query and K key/value heads of one tensor-parallel
rank, D head_dim, t tokens of one micro-batch on one rank, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from launch.config import JobConfig
from launch.context_cost import Work
from parallel.exchange_plan import exchange_plan, one_call_is_faster
from parallel.key_layout import buffer_room
from parallel.mesh import MeshShape
from parallel.sequence import causal_pairs
from parallel.ulysses import group_sizes

_EXCHANGE_BYTES = 2**30
"""Largest buffer of one layer's fetched keys and values for which `auto` exchanges."""
_TOKENS_PER_HEAD_GROUP = 4096
"""With fewer tokens a rank for each group of heads, a group's kernel is too short to hide the next one's way."""
_TIE = 0.01
"""By so much trading no heads may cost more than what costs least, and is still what `auto` takes: one mode's share of
the ideal moves as far from run to run, and an exchange gains by documents, which are not known here."""


@dataclass(frozen=True)
class ContextPlan:
    """The mode and why, and what the busiest rank holds during one layer's attention."""

    by_heads: int
    """U: ranks that trade heads for tokens."""
    by_keys: int
    """R: ranks among which keys travel, by exchange or in a ring."""
    keys: Literal["exchange", "ring"]
    fetched_tokens: int
    """M: tokens whose keys an exchanging rank holds, its own among them, of all rows of a micro-batch; with room
    for some twice where one call serves both chunks."""
    fetched_bytes: int
    """Bytes of their keys and values."""
    traffic: int
    """Bytes that the busiest rank receives in one layer's forward and backward."""
    head_groups: int
    """Groups that a rank's heads travel in, one while another is computed."""
    milliseconds: float
    """One layer's forward and backward, by the model of `context_cost`."""
    reason: str = "as configured"
    keep_gathered: bool = False
    """Fetched keys stay for the backward pass; else they are fetched again."""

    @property
    def balanced(self) -> bool:
        """Sequences are cut so that ranks have equal work: an exchange of keys alone can do without the zigzag."""
        return self.keys == "exchange" and self.by_heads == 1

    @property
    def mode(self) -> str:
        """In words."""
        parts = []
        if self.by_heads > 1:
            parts.append(f"heads over {self.by_heads}")
        if self.by_keys > 1:
            parts.append(f"{self.keys} of keys over {self.by_keys}")
        return " around ".join(parts) + " ranks"


def context_plan(job: JobConfig, mesh: MeshShape, bytes_per_number: int) -> ContextPlan | None:
    """None without context parallelism.

    All blocks attend alike; what the plan says of memory and traffic is of those with the widest window. `auto` takes
    the split that costs a block least on average (`context_cost`). Documents are not known here: they only make
    exchanges cheaper.
    """
    size, configured = mesh.context_parallel_size, job.parallel.context_parallel_mode
    if size == 1:
        return None
    kv_heads = job.model.num_key_value_heads // mesh.tensor_parallel_size
    splits = [ranks for ranks in range(1, min(size, kv_heads) + 1) if size % ranks == 0 and kv_heads % ranks == 0]
    if configured == "heads":
        splits = splits[-1:]
    elif configured != "auto":
        splits = [1]
    plans = []
    for by_heads in splits:
        by_window = _by_window(job, mesh, bytes_per_number, by_heads)
        average = fmean(by_window[window].milliseconds for window in job.model.windows)
        plans.append(replace(by_window[job.model.widest_window], milliseconds=average))
    chosen = min(plans, key=lambda plan: plan.milliseconds)
    if plans[0].milliseconds <= (1 + _TIE) * chosen.milliseconds:
        chosen = plans[0]
    return replace(chosen, reason=_why(chosen, plans)) if configured == "auto" else chosen


def plans_of_blocks(job: JobConfig, mesh: MeshShape, bytes_per_number: int) -> list[ContextPlan | None]:
    """For each block `context_plan`, with what its own window leaves of the keys."""
    plan = context_plan(job, mesh, bytes_per_number)
    if plan is None:
        return [None] * job.model.num_hidden_layers
    by_window = _by_window(job, mesh, bytes_per_number, plan.by_heads)
    return [by_window[window] for window in job.model.windows]


def _why(chosen: ContextPlan, plans: list[ContextPlan]) -> str:
    others = ", ".join(f"{plan.mode} {plan.milliseconds:.2f}" for plan in plans if plan is not chosen)
    modelled = f"takes {chosen.milliseconds:.2f} ms in a model of H200s ({others}) and " if others else ""
    reason = f"a layer {modelled}receives {chosen.traffic / 2**20:,.1f} MiB"
    if chosen.by_keys > 1:
        within = "within" if chosen.keys == "exchange" else "beyond"
        reason += (
            f", its fetched keys and values take {chosen.fetched_bytes / 2**20:,.1f} MiB, "
            f"{within} the {_EXCHANGE_BYTES // 2**20:,} MiB that auto allows"
        )
    return reason


def _by_window(job: JobConfig, mesh: MeshShape, width: int, by_heads: int) -> dict[int | None, ContextPlan]:
    """For each window that blocks have, their plan; in all of them keys travel as suits the widest."""
    widest = job.model.widest_window
    plan = _plan(job, mesh, width, by_heads, widest)
    others = set(job.model.windows) - {widest}
    return {widest: plan} | {window: _plan(job, mesh, width, by_heads, window, plan.keys) for window in others}


def _plan(
    job: JobConfig,
    mesh: MeshShape,
    width: int,
    by_heads: int,
    window: int | None,
    keys: Literal["exchange", "ring"] | None = None,
) -> ContextPlan:
    """`keys`: how they travel; None is as configured, or as their buffer fits."""
    length, rows = job.training.sequence_length, job.training.micro_batch_size
    configured, head_dim = job.parallel.context_parallel_mode, job.model.head_dim
    by_keys = mesh.context_parallel_size // by_heads
    query_heads = job.model.num_attention_heads // mesh.tensor_parallel_size
    kv_heads = job.model.num_key_value_heads // mesh.tensor_parallel_size
    tokens = rows * length // mesh.context_parallel_size

    # Among the ranks that trade keys: each has `own` tokens of some heads.
    own, pair = rows * length // by_keys, 2 * kv_heads // by_heads * head_dim * width
    joined = (rows == 1 or job.data.document_mask) and one_call_is_faster(query_heads // by_heads, length // by_keys)
    exchanges = [exchange_plan(length, by_keys, rank, window) for rank in range(by_keys)]
    fetched = rows * buffer_room(length, by_keys, window, joined and by_keys > 1)
    if keys is None:
        too_large = configured != "exchange" and fetched * pair > _EXCHANGE_BYTES
        keys = "ring" if configured == "ring" or too_large else "exchange"
    # The keys of two ranks are at most twice a rank's own.
    keep = keys == "exchange" and by_keys == 2 and by_heads == 1 and job.training.offload_activations == "none"
    calls, messages, traffic, exposed, merged = 2, 0, 0, 0, 0
    if by_keys > 1 and keys == "exchange":  # there, home again, and there once more if they were not kept
        messages = 2 if keep else 3
        calls = 2 if joined else 2 * max(len(plan.calls) for plan in exchanges)
        traffic = exposed = messages * rows * max(plan.received_tokens for plan in exchanges) * pair
    elif by_keys > 1:  # twice P - 1 hops with keys, and P hops with their gradients in fp32: the last is exposed
        messages, calls = 2 * (by_keys - 1) + by_keys, 2 * by_keys
        exposed = own * pair * 4 // width
        traffic = 2 * (by_keys - 1) * own * pair + by_keys * exposed
        merged = by_keys * tokens * query_heads * head_dim

    # Among those that trade heads: what the first group waits for, and what is left after the last, is exposed.
    groups = 1
    if by_heads > 1:
        groups = max(1, min(3, kv_heads // by_heads, tokens // _TOKENS_PER_HEAD_GROUP))
        sizes = group_sizes(kv_heads // by_heads, groups)
        traded = tokens * (by_heads - 1) // by_heads * 4 * (query_heads + kv_heads) * head_dim * width
        traffic, exposed = traffic + traded, exposed + traded * (sizes[0] + sizes[-1]) // (2 * sum(sizes))
        calls, messages = calls * groups, (messages + 4) * groups

    pairs = rows * query_heads * causal_pairs(length, window) // mesh.context_parallel_size
    work = Work(pairs, query_heads * tokens, head_dim, calls, messages, exposed, merged)
    return ContextPlan(
        by_heads=by_heads,
        by_keys=by_keys,
        keys=keys,
        fetched_tokens=fetched,
        fetched_bytes=fetched * pair,
        traffic=traffic,
        head_groups=groups,
        milliseconds=work.milliseconds,
        keep_gathered=keep,
    )
