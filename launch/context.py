"""How a job's context parallelism attends: by exchange or in a ring, and what the choice holds in memory.

K key/value heads of one rank, D head_dim, t tokens of one micro batch on one rank, M tokens that it fetches keys for,
its own among them; b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.config import JobConfig
from parallel.exchange_plan import exchange_plan
from parallel.mesh import MeshShape

_EXCHANGE_BYTES = 2**30
"""Largest buffer of one layer's fetched keys and values for which `auto` exchanges."""


@dataclass(frozen=True)
class ContextPlan:
    """The mode, why, and the tokens whose keys the busiest rank holds during one layer's attention."""

    mode: Literal["exchange", "ring"]
    reason: str
    fetched_tokens: int
    """M, of all rows of a micro batch."""
    keep_gathered: bool
    """Fetched keys stay for the backward pass: with two ranks they are at most twice a rank's own. With more they are
    fetched again."""


def context_plan(job: JobConfig, mesh: MeshShape, bytes_per_number: int) -> ContextPlan | None:
    """None without context parallelism.

    An exchange merges no partial results, so it is the faster one wherever its buffer fits; a ring needs no such
    buffer.
    """
    size = mesh.context_parallel_size
    if size == 1:
        return None
    rows = job.training.micro_batch_size
    fetched = rows * max(
        exchange_plan(job.training.sequence_length, size, rank, job.model.sliding_window).buffer_length
        for rank in range(size)
    )
    heads = job.model.num_key_value_heads // mesh.tensor_parallel_size
    buffer = 2 * fetched * heads * job.model.head_dim * bytes_per_number
    reason = f"a layer's fetched keys and values take {buffer / 2**20:,.1f} MiB"
    mode = job.parallel.context_parallel_mode
    if mode == "auto":
        mode = "exchange" if buffer <= _EXCHANGE_BYTES else "ring"
        reason += f", {'within' if mode == 'exchange' else 'beyond'} the {_EXCHANGE_BYTES // 2**20:,} of auto"
    else:
        reason = "as configured"
    return ContextPlan(mode, reason, fetched, keep_gathered=mode == "exchange" and size == 2)
