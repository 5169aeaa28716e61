"""What run_eval.py does on every rank: the validation loss of stored weights, and how it depends on the position.

Shapes: B rows of a micro-batch, L tokens of a row on this rank, E hidden_size, N ranges of positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.build import build_inference
from launch.config import JobConfig
from launch.data.batches import MicroBatch
from launch.data.corpora import corpora_on_all_ranks, validation_batches
from launch.environment import Place
from launch.feed import Cutter
from launch.rendezvous import join_world
from launch.weights.initial_weights import read_weights
from model.gpt import GPT
from model.kernels.linear_cross_entropy import IGNORED_LABEL
from parallel.mesh import ParallelMesh
from parallel.zero_inference import InferenceEngine

_RANGES = 7
"""Doubling from sequence_length / 64, as many ranges reach the end."""


def evaluate_weights(
    job: JobConfig,
    step: int | None,
    place: Place,
    device: torch.device,
    first_bucket: int | None = None,
    output: Path | None = None,
) -> None:
    """Prints a table of the loss of the weights that model.init_from names and writes it as JSON. Collective.

    Raises WeightsError, CorpusError, KernelUnavailable.
    """
    assert job.model.init_from is not None
    join_world(device.type, place)
    result = evaluated(job, step, ParallelMesh.create(job.mesh_shape(place.world_size)), device, first_bucket)
    if place.rank == 0:
        path = output or Path(job.model.init_from) / f"evaluation-{Path(result['weights']).name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{table(result)}\n\nwritten to {path}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def evaluated(
    job: JobConfig, step: int | None, mesh: ParallelMesh, device: torch.device, first_bucket: int | None = None
) -> dict[str, Any]:
    """The result, the same on every rank of the job's layout."""
    assert job.model.init_from is not None
    corpora = corpora_on_all_ranks(job)
    engine = build_inference(job, mesh, device)
    origin = read_weights(engine.fragments(), engine.shards, Path(job.model.init_from), step)
    engine.adopt_state()
    batches = validation_batches(corpora, job, mesh.dp_size, mesh.dp_rank).once(job.training.evaluation_batches)
    edges = position_edges(job.training.sequence_length, first_bucket)
    totals = loss_by_position(engine, Cutter.of(job, mesh, device), batches, edges, device)
    return {"weights": origin} | summary(totals, edges)


def position_edges(sequence_length: int, first: int | None = None) -> list[int]:
    """Edges of N ranges of positions: 0, `first`, and twice the one before up to the length."""
    edges = [0, first or max(1, sequence_length >> (_RANGES - 1))]
    while edges[-1] < sequence_length:
        edges.append(2 * edges[-1])
    return [*edges[:-1], sequence_length]


@torch.no_grad()
def loss_by_position(
    engine: InferenceEngine,
    cutter: Cutter,
    batches: Iterator[list[MicroBatch]],
    edges: Sequence[int],
    device: torch.device,
) -> Tensor:
    """[N, 2] fp64, the same on every rank: summed loss (nats) and labels of the tokens in each range of positions.

    A token's position is what the model can see before it: it counts from the start of its document under a document
    mask, else from the start of the sequence.
    """
    model = engine.model
    assert isinstance(model, GPT)
    inner, head = torch.tensor(edges[1:-1], device=device), model.lm_head
    by_range = _HeadByRange(head, len(edges) - 1, device)
    model.lm_head = by_range  # type: ignore[assignment]  # GPT names the class of its own head
    try:
        for micro_batches in batches:
            for micro_batch in micro_batches:
                batch = cutter.cut(micro_batch).to(device)
                by_range.ranges = torch.bucketize(batch.position_ids, inner, right=True).flatten()
                engine(*batch)
    finally:
        model.lm_head = head
    dist.all_reduce(by_range.totals, group=engine.mesh.zero_group)
    return by_range.totals


class _HeadByRange(nn.Module):
    """In the place of a head: asks it once for each range, for the hidden states of the tokens there."""

    def __init__(self, head: nn.Module, count: int, device: torch.device):
        super().__init__()
        self.head, self.count = head, count
        self.ranges = torch.empty(0, dtype=torch.int64)
        """[B * L] of the batch to come."""
        self.totals = torch.zeros(count, 2, dtype=torch.float64, device=device)

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """hidden [B, L, E], labels [B, L]."""
        nothing = labels.new_full((1,), IGNORED_LABEL)
        for number in range(self.count):
            # All ranks ask for all ranges, one token without loss at least: ZeRO-3 gathers the weight together.
            places = (self.ranges == number).nonzero().squeeze(1)
            rows = torch.cat([hidden.flatten(0, 1)[places], hidden[0, :1]])
            loss, count = self.head(rows[None], torch.cat([labels.flatten()[places], nothing])[None])
            self.totals[number] += torch.stack([loss.double(), count.double()])
        return self.totals.sum(dim=0).unbind()


def summary(totals: Tensor, edges: Sequence[int]) -> dict[str, Any]:
    """Mean losses in nats per token, over all and by range; a range without tokens has none."""

    def mean(loss: float, tokens: float) -> dict[str, Any]:
        return {"loss": loss / tokens if tokens else None, "tokens": int(tokens)}

    whole = mean(*totals.sum(dim=0).tolist())
    ranges = [
        {"first": first, "last": end - 1, **mean(*row)}
        for (first, end), row in zip(pairwise(edges), totals.tolist(), strict=True)
    ]
    return {**whole, "perplexity": math.exp(min(whole["loss"], 700.0)), "positions": ranges}


def table(result: dict[str, Any]) -> str:
    """The result for a reader: a loss that no longer falls says where context stops helping."""
    lines = [
        f"{result['weights']}: validation loss {result['loss']:.4f} nats a token, perplexity "
        f"{result['perplexity']:.3f}, over {result['tokens']:,} tokens",
        f"{'position':>19}  {'loss':>8}  {'change':>8}  {'tokens':>12}",
    ]
    before = None
    for row in result["positions"]:
        loss, change = row["loss"], ""
        if loss is not None and before is not None:
            change = f"{loss - before:+.4f}"
        shown = "" if loss is None else f"{loss:.4f}"
        lines.append(f"{row['first']:>9,}-{row['last']:<9,}  {shown:>8}  {change:>8}  {row['tokens']:>12,}")
        before = loss if loss is not None else before
    return "\n".join(lines)
