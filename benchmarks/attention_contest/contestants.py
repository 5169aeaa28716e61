"""Our ways to attend, by name; peers are in `peers.py`.

Shapes: L tokens of this rank, S = P x L tokens of the whole sequence, D = 128.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attention_contest.rows import HEAD_DIM, ONE_GPU, Row
from launch.config import JobConfig
from launch.context_plan import context_plan
from model.kernels import KERNELS, AttentionOperator, Documents, KernelOperator
from parallel.cuda_graphs import RecordedAttention
from parallel.exchange import ExchangeAttention
from parallel.mesh import MeshShape, ParallelMesh
from parallel.ring import RingAttention
from parallel.sequence import Part, balanced_parts, causal_parts, zigzag_parts
from parallel.transport import SymmetricTransport, Transport, make_transport
from parallel.ulysses import UlyssesAttention

GRAPHS_UP_TO = 8192
"""Tokens per rank: beyond, the host is faster than the GPU."""


@dataclass(frozen=True)
class Contestant:
    """One way to attend: to q [1, L, heads, D], k and v of the tokens at `positions`, inside `context`."""

    positions: Tensor
    """Which tokens of the whole sequence this rank holds, in its order; on the host."""
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)


Builder = Callable[[], Contestant]


def _positions(part: Part) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in part])


@dataclass(frozen=True)
class Stage:
    """Where a row is measured: by which rank of how many, on which device, over which transports."""

    row: Row
    kernel: str
    device: torch.device
    rank: int
    ranks: int
    transport: Callable[[int], Transport]
    """One of this rank's transports, by its number: the same at every call, as its memory grows to the largest row."""

    @classmethod
    def of_world(cls, row: Row, kernel: str, device: torch.device) -> Stage:
        """For this process, among all that torch.distributed knows."""
        return cls(row, kernel, device, dist.get_rank(), dist.get_world_size(), partial(_transport, device))

    @property
    def length(self) -> int:
        """S."""
        return self.row.local_tokens * self.ranks

    @property
    def window(self) -> int | None:
        return self.row.window or None

    def zigzag(self) -> Tensor:
        """The order of `parallel.sequence`, which most peers share."""
        return _positions(zigzag_parts(self.length, self.ranks)[self.rank])

    def balanced(self) -> Tensor:
        """Cut as `ExchangeAttention(balanced=True)` expects it."""
        if self.row.documents:
            parts = balanced_parts(self.length, self.ranks, self.row.boundaries(self.ranks), self.window)
        else:
            parts = causal_parts(self.length, self.ranks, self.row.heads, self.window)
        return _positions(parts[self.rank])

    def striped(self) -> Tensor:
        """Every P-th token (arXiv:2311.09431)."""
        return torch.arange(self.rank, self.length, self.ranks)

    def contiguous(self) -> Tensor:
        """One run of tokens a rank."""
        return torch.arange(self.row.local_tokens) + self.rank * self.row.local_tokens


def our_contestants(stage: Stage) -> dict[str, Builder]:
    """One GPU on the whole sequence first, then every mode that can share this row's heads."""
    row, settings = stage.row, {"scale": HEAD_DIM**-0.5, "window": stage.window}
    kernel = KERNELS[stage.kernel]
    documents = cache(
        lambda: Documents.from_boundaries(row.boundaries(stage.ranks), stage.device) if row.documents else None
    )

    def entry(make: Callable[[], AttentionOperator], positions: Callable[[], Tensor] = stage.zigzag) -> Contestant:
        operator = make()
        return Contestant(positions(), lambda q, k, v: operator(q, k, v, documents()))

    def heads(groups: int, number: int = 0) -> AttentionOperator:
        return UlyssesAttention(stage.transport(number), KernelOperator(kernel, **settings), head_groups=groups)

    def exchange(number: int = 0, **variant: bool) -> AttentionOperator:
        return ExchangeAttention(stage.transport(number), kernel, **variant, **settings)

    def exchange_within_heads(by_heads: int) -> AttentionOperator:
        neighbours, across = split_transports(stage.device, by_heads)
        return UlyssesAttention(neighbours, ExchangeAttention(across, kernel, keep_gathered=False, **settings))

    found = {ONE_GPU: partial(entry, lambda: KernelOperator(kernel, **settings), lambda: torch.arange(stage.length))}
    by_heads = row.key_value_heads % stage.ranks == 0
    for groups in (1, 2, 3, 4):
        if by_heads and groups <= row.key_value_heads // stage.ranks:
            found[heads_name(groups)] = partial(entry, partial(heads, groups))
    found["exchange"] = partial(entry, exchange)
    found["exchange, balanced cut"] = partial(entry, partial(exchange, balanced=True), stage.balanced)
    if row.local_tokens <= GRAPHS_UP_TO and not row.documents and graphs_run(stage):
        # A graph remembers its transport's memory, so it has one of its own.
        if by_heads:
            found["heads, CUDA graphs"] = partial(entry, lambda: RecordedAttention(heads(1), heads(1, 1)))
        found["exchange, CUDA graphs"] = partial(entry, lambda: RecordedAttention(exchange(), exchange(2)))
    for inner in range(2, stage.ranks):
        if stage.ranks % inner == 0 and row.key_value_heads % inner == 0:
            found[mixed_name(inner, stage.ranks // inner)] = partial(entry, partial(exchange_within_heads, inner))
    found["zigzag ring"] = partial(entry, lambda: RingAttention(dist.group.WORLD, kernel, **settings))
    return found


def heads_name(groups: int) -> str:
    return f"heads, {groups} group{'s' * (groups > 1)}"


def mixed_name(by_heads: int, by_keys: int) -> str:
    return f"exchange over {by_keys} within heads over {by_heads}"


def auto_name(row: Row, ranks: int) -> str | None:
    """The contestant that `context_parallel_mode: auto` takes for a job of this shape; None on one GPU."""
    job = JobConfig.model_validate(
        {
            "model": {
                "vocab_size": 256,
                "hidden_size": row.heads * HEAD_DIM,
                "intermediate_size": HEAD_DIM,
                "num_hidden_layers": 1,
                "num_attention_heads": row.heads,
                "num_key_value_heads": row.key_value_heads,
                "head_dim": HEAD_DIM,
                "sliding_window": row.window or None,
            },
            "parallel": {"context_parallel_size": ranks},
            "data": {"source": "python_stdlib", "document_mask": row.documents > 0},
            "optimizer": {"learning_rate": 1.0},
            "training": {"sequence_length": row.local_tokens * ranks, "global_batch_size": 1, "max_steps": 1},
        }
    )
    plan = context_plan(job, MeshShape(1, ranks, 1), 2)
    if plan is None:
        return None
    if plan.by_heads == ranks:
        return heads_name(plan.head_groups)
    if plan.by_heads > 1:
        return mixed_name(plan.by_heads, plan.by_keys)
    if plan.keys == "ring":
        return "zigzag ring"
    return "exchange, balanced cut" if plan.balanced else "exchange"


@cache
def _transport(device: torch.device, number: int) -> Transport:
    return make_transport(dist.group.WORLD, device)


@cache
def split_transports(device: torch.device, by_heads: int) -> tuple[Transport, Transport]:
    """Among `by_heads` neighbours, and among the ranks at one place of each such group."""
    mesh = ParallelMesh.create(MeshShape(1, dist.get_world_size(), 1))
    neighbours, across = mesh.split_context(by_heads, device)
    return make_transport(neighbours, device), make_transport(across, device)


def graphs_run(stage: Stage) -> bool:
    return isinstance(stage.transport(0), SymmetricTransport)
