"""The process groups of a mesh: who is in them, in which order, and that they carry messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import MeshShape, ParallelMesh
from tests.distributed.harness import run_distributed

SHAPES = [(1, 1, 8), (8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4)]
"""tp x cp x dp."""


def _meshes() -> bool:
    rank = dist.get_rank()
    for tp_size, cp_size, dp_size in SHAPES:
        mesh = ParallelMesh.create(MeshShape(tp_size, cp_size, dp_size))
        # The grid as the file's first lines draw it: rank = (dp * cp_size + cp) * tp_size + tp.
        grid = torch.arange(8).view(dp_size, cp_size, tp_size)
        dp, cp, tp = (int(where) for where in (grid == rank).nonzero()[0])
        assert (mesh.tp_rank, mesh.cp_rank, mesh.dp_rank) == (tp, cp, dp)
        assert (mesh.tp_size, mesh.cp_size, mesh.dp_size) == (tp_size, cp_size, dp_size)
        assert mesh.rank == rank and mesh.zero_size == cp_size * dp_size
        expected = {
            mesh.tp_group: grid[dp, cp],
            mesh.cp_group: grid[dp, :, tp],
            mesh.zero_group: grid[:, :, tp].flatten(),
        }
        for group, members in expected.items():
            assert dist.get_process_group_ranks(group) == members.tolist()
            total = torch.tensor([float(rank)])
            dist.all_reduce(total, group=group)
            assert total.item() == members.sum().item()
        assert dist.get_rank(mesh.tp_group) == tp and dist.get_rank(mesh.cp_group) == cp
        assert mesh.zero_rank == dist.get_rank(mesh.zero_group) == dp * cp_size + cp
        # One communicator each: the ring's messages and ZeRO's never wait behind each other.
        assert len({id(mesh.tp_group), id(mesh.cp_group), id(mesh.zero_group), id(dist.group.WORLD)}) == 4
    with pytest.raises(AssertionError, match="has 4 ranks, the world 8"):
        ParallelMesh.create(MeshShape(2, 2, 1))
    return True


def test_groups_of_every_shape() -> None:
    assert all(run_distributed(_meshes, 8))
