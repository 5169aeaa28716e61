"""From a micro-batch of the data pipeline to this rank's tensors on its device.

Shapes: B micro_batch_size, S sequence_length, L = S / context_parallel_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.config import JobConfig
from launch.context_plan import context_plan
from launch.data.batches import MicroBatch
from launch.precision import BYTES
from model.kernels import Documents
from model.kernels.linear_cross_entropy import IGNORED_LABEL
from parallel.mesh import ParallelMesh
from parallel.sequence import balanced_parts, causal_parts, document_rows, shard_sequence


class LocalBatch(NamedTuple):
    """What the model takes, in the order of GPT.forward: this rank's part of each sequence, [B, L] int64, and the
    documents of the whole ones."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    documents: Documents | None


@dataclass(frozen=True)
class HostBatch:
    """A micro-batch cut for this rank, still on the host (pinned where a GPU will take it)."""

    tokens: Tensor
    """[3, B, L]: input_ids, position_ids, labels: one copy to the device instead of three."""
    boundaries: tuple[int, ...] | None
    token_count: int
    """Labels that carry loss."""

    def to(self, device: torch.device) -> LocalBatch:
        """Starts the copy; on a GPU it runs beside earlier work."""
        input_ids, position_ids, labels = self.tokens.to(device, non_blocking=True)
        documents = None if self.boundaries is None else Documents.from_boundaries(self.boundaries, device)
        return LocalBatch(input_ids, position_ids, labels, documents)


@dataclass(frozen=True)
class Cutter:
    """Cuts micro-batches for one context-parallel rank, as its attention expects them."""

    size: int
    rank: int
    pin: bool = False
    balanced: bool = False
    """Whether to cut so that ranks have equal work; else in zigzag order."""
    window: int | None = None
    query_heads: int = 1
    """Query heads of one rank. With the window (of the blocks that see most), they decide what equal work is."""

    @classmethod
    def of(cls, job: JobConfig, mesh: ParallelMesh, device: torch.device) -> Cutter:
        plan = context_plan(job, mesh.shape, BYTES[job.resolve_precision(device.type)])
        balanced = plan is not None and plan.balanced
        heads = job.model.num_attention_heads // mesh.shape.tensor_parallel_size
        return cls(mesh.cp_size, mesh.cp_rank, device.type == "cuda", balanced, job.model.widest_window, heads)

    def cut(self, batch: MicroBatch) -> HostBatch:
        """This rank's part of `batch`."""
        arrays = batch.input_ids, batch.position_ids, batch.labels
        if self.balanced:
            parts = self._balanced(np.stack(arrays), batch.boundaries)
        else:
            parts = np.stack([shard_sequence(array, self.size, self.rank) for array in arrays])
        tokens, count = torch.from_numpy(parts), int((parts[2] != IGNORED_LABEL).sum())
        return HostBatch(tokens.pin_memory() if self.pin else tokens, batch.boundaries, count)

    def _balanced(self, arrays: NDArray[np.int64], boundaries: Sequence[int] | None) -> NDArray[np.int64]:
        """[3, B, S] as [3, B, L]: each row is cut by documents of its own, or all alike."""
        _, batch, length = arrays.shape
        if boundaries is None:
            part = causal_parts(length, self.size, self.query_heads * batch, self.window)[self.rank]
            return np.concatenate([arrays[:, :, start:stop] for start, stop in part], axis=2)
        rows = []
        for row, documents in enumerate(document_rows(boundaries, batch, length)):
            part = balanced_parts(length, self.size, documents, self.window)[self.rank]
            rows.append(np.concatenate([arrays[:, row, start:stop] for start, stop in part], axis=1))
        return np.stack(rows, axis=1)
