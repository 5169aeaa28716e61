"""The mesh of processes: the place of each rank, and the ranks it communicates with along each axis.

    rank = (dp * context_parallel_size + cp) * tensor_parallel_size + tp

Tensor parallelism is innermost because it communicates most (twice a layer, on the critical path), so it belongs inside
one node. Context parallelism comes next (once a layer, hidden behind attention). Data parallelism is outermost. ZeRO
shards over dp x cp together, because every rank of that product holds the same tensor-parallel slice of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the three axes; needs no process group, so a login node can reason about it."""

    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1

    @classmethod
    def fit(cls, world_size: int, tensor_parallel_size: int, context_parallel_size: int) -> MeshShape:
        """The mesh of `world_size` ranks. Raises ValueError where tp x cp does not divide it."""
        model_parallel_size = tensor_parallel_size * context_parallel_size
        if world_size < 1 or world_size % model_parallel_size:
            below = world_size // model_parallel_size * model_parallel_size
            nearest = " or ".join(str(size) for size in (below, below + model_parallel_size) if size > 0)
            raise ValueError(
                f"world size ({world_size}) must be a multiple of tensor_parallel_size x context_parallel_size "
                f"({tensor_parallel_size} x {context_parallel_size} = {model_parallel_size}); start {nearest} "
                "processes or change the sizes"
            )
        return cls(tensor_parallel_size, context_parallel_size, world_size // model_parallel_size)

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.context_parallel_size * self.data_parallel_size

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, cp, dp) of `rank`."""
        rest, tp = divmod(rank, self.tensor_parallel_size)
        dp, cp = divmod(rest, self.context_parallel_size)
        return tp, cp, dp

    @property
    def grid(self) -> NDArray[np.int64]:
        """[dp, cp, tp] the rank that stands there."""
        sizes = self.data_parallel_size, self.context_parallel_size, self.tensor_parallel_size
        return np.arange(self.world_size, dtype=np.int64).reshape(sizes)

    def __str__(self) -> str:
        return f"tp {self.tensor_parallel_size} x cp {self.context_parallel_size} x dp {self.data_parallel_size}"


@dataclass(frozen=True)
class ParallelMesh:
    """This rank's place in the mesh and its process groups. Made once by `ParallelMesh.create`, then passed on.

    No group is ever None: torch reads None as the whole world.
    """

    shape: MeshShape
    rank: int
    tp_group: ProcessGroup
    """Ranks that hold slices of the same layers and see the same tokens."""
    cp_group: ProcessGroup
    """Ranks that hold parts of the same sequences; the ring's own communicator."""
    zero_group: ProcessGroup
    """dp x cp: ranks over which ZeRO shards states and averages gradients."""

    @classmethod
    def create(cls, shape: MeshShape) -> ParallelMesh:
        """Collective over the world: every rank must call it. Needs an initialised default process group."""
        world_size, rank = dist.get_world_size(), dist.get_rank()
        assert shape.world_size == world_size, f"mesh {shape} has {shape.world_size} ranks, the world {world_size}"
        lines = shape.grid.reshape(-1, shape.tensor_parallel_size)
        return cls(
            shape=shape,
            rank=rank,
            tp_group=_own_group("tp", rank, lines),
            cp_group=_own_group("cp", rank, shape.grid.swapaxes(1, 2).reshape(-1, shape.context_parallel_size)),
            zero_group=_own_group("dp x cp", rank, lines.T),
        )

    def split_context(self, by_heads: int, device: torch.device) -> tuple[ProcessGroup, ProcessGroup]:
        """This rank's groups in a split of the cp axis: `by_heads` neighbours, and the ranks at its place among theirs.

        Collective over the world. The groups are the split's own, so that its messages meet no others, and warm.
        """
        split = self.shape.grid.swapaxes(1, 2).reshape(-1, self.cp_size // by_heads, by_heads)
        neighbours, across = split.reshape(-1, by_heads), split.swapaxes(1, 2).reshape(-1, self.cp_size // by_heads)
        groups = _own_group("heads", self.rank, neighbours), _own_group("cp across heads", self.rank, across)
        _warm_up(groups, device)
        return groups

    def split_zero(self, size: int) -> ProcessGroup:
        """This rank's group of `size` neighbours in dp x cp. Collective over the world."""
        return _own_group(
            "secondary partition", self.rank, self.shape.grid.reshape(-1, self.tp_size).T.reshape(-1, size)
        )

    def warm_up(self, device: torch.device) -> None:
        """One collective in every group, on the device that will train. Collective over the world.

        NCCL makes a group's communicator at its first use and waits for all its ranks; a first use in which only some
        of them exchange messages would hang.
        """
        _warm_up((self.tp_group, self.cp_group, self.zero_group), device)

    @property
    def tp_rank(self) -> int:
        return self.shape.coordinates(self.rank)[0]

    @property
    def cp_rank(self) -> int:
        return self.shape.coordinates(self.rank)[1]

    @property
    def dp_rank(self) -> int:
        return self.shape.coordinates(self.rank)[2]

    @property
    def tp_size(self) -> int:
        return self.shape.tensor_parallel_size

    @property
    def cp_size(self) -> int:
        return self.shape.context_parallel_size

    @property
    def dp_size(self) -> int:
        return self.shape.data_parallel_size

    @property
    def zero_rank(self) -> int:
        return dist.get_rank(self.zero_group)

    @property
    def zero_size(self) -> int:
        return self.dp_size * self.cp_size


def _own_group(name: str, rank: int, partition: NDArray[np.int64]) -> ProcessGroup:
    """Creates a group of each row (each rank must take part in each creation) and returns this rank's."""
    groups = [(ranks, dist.new_group(ranks, group_desc=name)) for ranks in partition.tolist()]
    return next(group for ranks, group in groups if rank in ranks)


def _warm_up(groups: tuple[ProcessGroup, ...], device: torch.device) -> None:
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
