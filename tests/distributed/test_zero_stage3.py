"""`parallel.zero_stage3` beside what it replaces of DeepSpeed: the same state and norms, padded parts too."""

from __future__ import annotations

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

from parallel.mesh import MeshShape, ParallelMesh
from parallel.zero import ZeroEngine
from parallel.zero_stage3 import update_in_one_pass
from tests.distributed.harness import run_distributed
from tests.distributed.test_zero import make_engine, train_step

Found = tuple[list[Tensor], list[float]]


def _trained(mesh: ParallelMesh, clipping: float, change: Callable[[ZeroEngine], None] = lambda engine: None) -> Found:
    """This rank's master weights and moments after two steps, and the two gradient norms."""
    engine = make_engine(mesh, 3, clipping)
    change(engine)
    norms = []
    for _ in range(2):
        train_step(engine)
        norms.append(float(engine.grad_norm))
    return [tensor.clone() for fragment in engine.fragments() for tensor in fragment.tensors.values()], norms


@contextmanager
def _nothing_replaced() -> Iterator[None]:
    with mock.patch.object(ZeroEngine, "_tune_stage3", lambda engine, sizes: None):
        yield


@contextmanager
def _everything_replaced() -> Iterator[None]:
    with mock.patch.object(deepspeed_stage3, "reduce_scatter_coalesced", side_effect=AssertionError("DeepSpeed's")):
        yield


def _update_with_fused_adamw(engine: ZeroEngine) -> None:
    """What ZeroEngine does on GPUs."""
    for group in engine.optimizer.param_groups:
        group["fused"] = True
    update_in_one_pass(engine.engine.optimizer)


def _mapped_files(folder: str, shares: Tensor, group: ProcessGroup) -> list[Tensor]:
    """What `symmetric_views` gives on GPUs: memory of every rank that all ranks see."""
    ranks = dist.get_process_group_ranks(group)
    return [torch.from_file(f"{folder}/{rank}", True, shares.numel(), dtype=shares.dtype) for rank in ranks]


def _read(folder: str, engine: ZeroEngine) -> None:
    """Gathers by reading, rank 0 always ahead of the others' updates."""
    engine.gather_by_reading(partial(_mapped_files, folder))
    assert all(parameter.ds_tensor.untyped_storage().filename for parameter in engine.model.parameters())  # type: ignore[attr-defined]
    optimizer = engine.engine.optimizer
    update = optimizer._reassign_or_swap_out_partitioned_parameters

    def late(sub_group: int) -> None:
        time.sleep(0.5 * (dist.get_rank() > 0))
        update(sub_group)

    optimizer._reassign_or_swap_out_partitioned_parameters = late


def _differences(folder: str) -> list[float]:
    """Largest difference of a tensor to DeepSpeed's own in each form, of a norm too, over the largest element."""
    found = []
    for number, (sizes, clipping) in enumerate((((1, 1, 4), 100.0), ((2, 1, 2), 0.05))):
        mesh = ParallelMesh.create(MeshShape(*sizes))
        with _nothing_replaced():
            theirs, norms = _trained(mesh, clipping)
        with _everything_replaced():
            files = f"{folder}/{number}"
            changes = (lambda engine: None), _update_with_fused_adamw, partial(_read, files)
            Path(files).mkdir(exist_ok=True)
            forms = [_trained(mesh, clipping, change) for change in changes]
        for ours, our_norms in forms:
            found.append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)))
            found.append(max(abs(a / b - 1) for a, b in zip(our_norms, norms, strict=True)))
            assert all(torch.isfinite(tensor).all() for tensor in ours)
    return found


def test_the_same_numbers_as_deepspeed(tmp_path: Path) -> None:
    for differences in run_distributed(_differences, 4, str(tmp_path)):
        assert max(differences) < 1e-5, differences
