"""Training state on disk, in torch.distributed.checkpoint's format, keyed by full parameter names.

Every rank writes its rectangles of the full tensors and reads those it needs, whatever mesh and stage wrote them.
Nothing is gathered and nothing is converted. This works because ZeRO holds a flat range of this rank's slice of a
parameter. A flat range of a row-major matrix is at most three rectangles (the end of a row, whole rows, the start of a
row), and a slice only shifts them.

Keys: parameter/NAME (fp32), exp_avg/NAME, exp_avg_sq/NAME, with NAME the model's own parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from parallel.tensor import TensorShard
from parallel.torch_files import StateFiles, reader, writer
from parallel.zero_state import StateFragment


class StateMismatch(ValueError):
    """The checkpoint lacks a tensor of the model, or holds it with another shape."""


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of one full tensor and the memory of this rank that holds it."""

    key: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor


def rectangles(fragment: StateFragment, shard: TensorShard) -> Iterator[Rectangle]:
    """The rectangles of the full parameter and moments that a fragment covers, vocabulary padding left out."""
    width = math.prod(shard.sizes[1:])
    start, stop = fragment.start, min(fragment.start + fragment.numel, shard.sizes[0] * width)
    for low, high in _row_aligned(start, stop, width):
        row, column = divmod(low, width)
        shape: tuple[int, ...]
        if len(shard.full_shape) == 1:
            offsets: tuple[int, ...] = (shard.offsets[0] + low,)
            shape = (high - low,)
        else:
            assert len(shard.full_shape) == 2, f"{fragment.name}: vectors and matrices only, got {shard.full_shape}"
            offsets = (shard.offsets[0] + row, shard.offsets[1] + column)
            shape = (max(1, (high - low) // width), min(width, high - low))
        for kind, tensor in fragment.tensors.items():
            part = tensor[low - fragment.start : high - fragment.start].view(shape)
            yield Rectangle(f"{kind}/{fragment.name}", shard.full_shape, offsets, part)


def _row_aligned(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cuts a flat range into the end of a row, whole rows and the start of a row; a vector (width 1) is not cut."""
    while start < stop:
        if start % width:
            end = min(stop, start - start % width + width)
        elif stop - start >= width:
            end = stop - stop % width
        else:
            end = stop
        yield start, end
        start = end


def save_state(
    files: StateFiles,
    fragments: Iterable[StateFragment],
    shards: Mapping[str, TensorShard],
    group: ProcessGroup,
) -> None:
    """Writes this rank's fragments into `files`, a fresh folder. Collective over `group` (all ranks).

    Raises torch's CheckpointException on every rank if any rank could not write.
    """
    parts = [part for fragment in fragments for part in rectangles(fragment, shards[fragment.name])]
    save(
        {},
        storage_writer=writer(files),
        planner=_SaveRectangles(parts),
        process_group=group,
    )


def load_state(
    files: StateFiles,
    fragments: Iterable[StateFragment],
    shards: Mapping[str, TensorShard],
    group: ProcessGroup,
) -> None:
    """Fills this rank's fragments from `files`, whatever layout wrote it. Collective over `group` (all ranks).

    Raises StateMismatch (wrapped in torch's CheckpointException) where the checkpoint is of another model.
    """
    parts = [part for fragment in fragments for part in rectangles(fragment, shards[fragment.name])]
    load(
        {},
        storage_reader=reader(files),
        planner=LoadRectangles(parts),
        process_group=group,
    )


class _SaveRectangles(DefaultSavePlanner):
    """Plans one write for each rectangle; the global plan and its checks are torch's."""

    def __init__(self, parts: list[Rectangle]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = {(part.key, part.offsets): part.tensor for part in parts}
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(part.key, torch.Size(part.offsets)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(part),
                        properties=TensorProperties.create_from_tensor(part.tensor),
                        size=torch.Size(part.full_shape),
                    ),
                )
                for part in self._parts
            ]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        return self._tensors[write_item.index.fqn, tuple(write_item.index.offset)].detach()


class LoadRectangles(DefaultLoadPlanner):
    """Plans the reads whose overlap with the stored rectangles fills this rank's."""

    def __init__(self, parts: list[Rectangle]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = {(part.key, part.offsets): part.tensor for part in parts}
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items: list[ReadItem] = []
        for part in self._parts:
            stored = self.metadata.state_dict_metadata.get(part.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise StateMismatch(f"the checkpoint has no tensor {part.key}; it was written by another model")
            if tuple(stored.size) != part.full_shape:
                raise StateMismatch(
                    f"{part.key} is {list(stored.size)} in the checkpoint but {list(part.full_shape)} in this model"
                )
            items += create_read_items_for_chunk_list(part.key, stored, [_chunk(part)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._tensors[index.fqn, tuple(index.offset)].detach()


def _chunk(part: Rectangle) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=part.tensor.shape)
