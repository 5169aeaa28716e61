"""`parallel.zero_stage3` beside what it replaces of DeepSpeed: the same state and norms, padded parts too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3 as deepspeed_stage3
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import zero_shares, zero_stage3
from parallel.mesh import MeshShape, ParallelMesh
from parallel.zero import ZeroEngine
from parallel.zero_shares import SharesInReach
from parallel.zero_stage3 import (
    exchange_and_accumulate,
    gather_without_copies,
    reduce_without_interleaving,
    update_in_one_pass,
)
from tests.distributed.harness import run_distributed
from tests.distributed.test_zero import ACCUMULATION, make_engine, train_step

Found = tuple[list[Tensor], list[float]]


def _messages_of_gpus(engine: ZeroEngine) -> None:
    """What ZeroEngine does on GPUs."""
    gather_without_copies(engine.model)
    reduce_without_interleaving(engine.engine.optimizer)


def _nothing(engine: ZeroEngine) -> None:
    """DeepSpeed's own."""


def _trained(mesh: ParallelMesh, clipping: float, change: Callable[[ZeroEngine], None] = _nothing) -> Found:
    """This rank's master weights and moments after two steps, and the two gradient norms."""
    engine = make_engine(mesh, 3, clipping)
    change(engine)
    norms = []
    with mock.patch.object(zero_stage3, "_read_here") as told:
        for _ in range(2):
            train_step(engine)
            norms.append(float(engine.grad_norm))
    read = sum(len(call.args[0]) for call in told.call_args_list)
    assert read in (0, 2 * ACCUMULATION * len(list(engine.model.parameters()))), "the allocator is told of all or none"
    assert (read == 0) == (change is _nothing)
    return [tensor.clone() for fragment in engine.fragments() for tensor in fragment.tensors.values()], norms


@contextmanager
def _nothing_replaced() -> Iterator[None]:
    with mock.patch.object(ZeroEngine, "_tune_stage3", lambda engine, sizes: None):
        yield


@contextmanager
def _everything_replaced() -> Iterator[None]:
    with mock.patch.object(deepspeed_stage3, "reduce_scatter_coalesced", side_effect=AssertionError("DeepSpeed's")):
        yield


def _exchanged_gradients(engine: ZeroEngine) -> None:
    """And this, where gradients are narrower than their sums."""
    _messages_of_gpus(engine)
    exchange_and_accumulate(engine.engine.optimizer)


class _MappedFiles:
    """What `PeerMemory` is on GPUs: memory of every rank that all ranks see."""

    def __init__(self, folder: str, size: int, device: torch.device, group: ProcessGroup):
        self.paths = [f"{folder}/{rank}" for rank in dist.get_process_group_ranks(group)]

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.from_file(self.paths[rank], True, math.prod(shape), dtype=dtype).view(shape)


def _shares_read(folder: str, engine: ZeroEngine) -> None:
    """And this, where ranks reach each other; rank 0 is always ahead of the others' updates."""
    reduce_without_interleaving(engine.engine.optimizer)
    optimizer = engine.engine.optimizer
    with mock.patch.object(zero_shares, "PeerMemory", partial(_MappedFiles, folder)):
        engine._shares = SharesInReach(engine.model, optimizer, engine.mesh.zero_group)
    assert all(parameter.ds_tensor.untyped_storage().filename for parameter in engine.model.parameters())  # type: ignore[attr-defined]
    update = optimizer._reassign_or_swap_out_partitioned_parameters

    def late(sub_group: int) -> None:
        time.sleep(0.5 * (dist.get_rank() > 0))
        update(sub_group)

    optimizer._reassign_or_swap_out_partitioned_parameters = late


def _update_with_fused_adamw(engine: ZeroEngine) -> None:
    """And this."""
    _messages_of_gpus(engine)
    for group in engine.optimizer.param_groups:
        group["fused"] = True
    update_in_one_pass(engine.engine.optimizer)


def _differences(folder: str) -> list[float]:
    """Largest difference of a tensor to DeepSpeed's own in each form, of a norm too, over the largest element."""
    found = []
    for number, (sizes, clipping) in enumerate((((1, 1, 4), 100.0), ((2, 1, 2), 0.05))):
        mesh = ParallelMesh.create(MeshShape(*sizes))
        with _nothing_replaced():
            theirs, norms = _trained(mesh, clipping)
        with _everything_replaced():
            files = Path(folder, str(number))
            files.mkdir(exist_ok=True)
            read = partial(_shares_read, str(files))
            changes = _messages_of_gpus, _exchanged_gradients, read, _update_with_fused_adamw
            forms = [_trained(mesh, clipping, change) for change in changes]
        for ours, our_norms in forms:
            found.append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)))
            found.append(max(abs(a / b - 1) for a, b in zip(our_norms, norms, strict=True)))
            assert all(torch.isfinite(tensor).all() for tensor in ours)
    return found


def test_the_same_numbers_as_deepspeed(tmp_path: Path) -> None:
    for differences in run_distributed(_differences, 4, str(tmp_path)):
        assert max(differences) < 1e-5, differences
