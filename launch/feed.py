"""From a micro-batch of the data pipeline to this rank's tensors on its device.

Shapes: B micro_batch_size, S sequence_length, L = S / context_parallel_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.data import MicroBatch
from model.kernels import Documents
from model.kernels.linear_cross_entropy import IGNORED_LABEL
from parallel.mesh import ParallelMesh
from parallel.sequence import shard_sequence


@dataclass(frozen=True)
class LocalBatch:
    """What the model takes: this rank's part of each sequence, [B, L] int64, and the documents of the whole ones."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    documents: Documents | None

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Documents | None]:
        """In the order of GPT.forward."""
        return self.input_ids, self.position_ids, self.labels, self.documents


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


def cut(batch: MicroBatch, mesh: ParallelMesh, *, pin: bool) -> HostBatch:
    """This context-parallel rank's part of a micro-batch."""
    parts: list[NDArray[np.int64]] = [
        shard_sequence(array, mesh.cp_size, mesh.cp_rank)
        for array in (batch.input_ids, batch.position_ids, batch.labels)
    ]
    tokens = torch.from_numpy(np.stack(parts))
    count = int((parts[2] != IGNORED_LABEL).sum())
    return HostBatch(tokens.pin_memory() if pin else tokens, batch.boundaries, count)
