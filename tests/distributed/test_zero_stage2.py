"""`parallel.zero_stage2` beside what it replaces of DeepSpeed: the same state and norms, padded parts too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from parallel.mesh import MeshShape, ParallelMesh
from parallel.zero import ZeroEngine
from parallel.zero_stage2 import clip_as_adamw_reads, exchange_and_accumulate, measure_norm_once
from tests.distributed.harness import run_distributed
from tests.distributed.test_zero import make_engine, train_step

Found = tuple[list[Tensor], list[float]]


def _nothing(engine: ZeroEngine) -> None:
    """DeepSpeed's own."""


def _one_norm(engine: ZeroEngine) -> None:
    measure_norm_once(engine.engine.optimizer)


def _exchanged(bucket_size: int, engine: ZeroEngine) -> None:
    """And this."""
    _one_norm(engine)
    exchange_and_accumulate(engine.engine.optimizer, bucket_size)


def _update_with_fused_adamw(engine: ZeroEngine) -> None:
    """And this."""
    _exchanged(2000, engine)
    for group in engine.optimizer.param_groups:
        group["fused"] = True
    clip_as_adamw_reads(engine.engine.optimizer)


def _trained(mesh: ParallelMesh, clipping: float, change: Callable[[ZeroEngine], None]) -> Found:
    """This rank's master weights and moments after two steps, and the two gradient norms."""
    with mock.patch.object(ZeroEngine, "_tune_stage2", lambda engine, sizes: change(engine)):
        engine = make_engine(mesh, 2, clipping)
    norms = []
    for _ in range(2):
        train_step(engine)
        norms.append(float(engine.grad_norm))
    return [tensor.clone() for fragment in engine.fragments() for tensor in fragment.tensors.values()], norms


@contextmanager
def _reduced_by_nobody() -> Iterator[None]:
    with mock.patch.object(DeepSpeedZeroOptimizer, "average_tensor", side_effect=AssertionError("DeepSpeed's")):
        yield


def _differences(meshes: dict[tuple[int, int, int], float]) -> list[float]:
    """Largest difference of a tensor to DeepSpeed's own in each form, of a norm too, over the largest element."""
    found = []
    for sizes, clipping in meshes.items():
        mesh = ParallelMesh.create(MeshShape(*sizes))
        theirs, norms = _trained(mesh, clipping, _nothing)
        forms = [_trained(mesh, clipping, _one_norm)]
        with _reduced_by_nobody():
            for change in partial(_exchanged, 10**9), partial(_exchanged, 1), _update_with_fused_adamw:
                forms.append(_trained(mesh, clipping, change))
        for ours, our_norms in forms:
            found.append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)))
            found.append(max(abs(a / b - 1) for a, b in zip(our_norms, norms, strict=True)))
            assert all(torch.isfinite(tensor).all() for tensor in ours)
    return found


def test_the_same_numbers_as_deepspeed() -> None:
    alone = run_distributed(_differences, 2, {(2, 1, 1): 0.05})
    among_others = run_distributed(_differences, 4, {(1, 1, 4): 100.0, (2, 1, 2): 0.05})
    for differences in alone + among_others:
        assert max(differences) < 1e-5, differences
