"""`parallel.zero_stage3` beside what it replaces of DeepSpeed: the same state and norms, padded parts too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from deepspeed.runtime.zero import stage3 as deepspeed_stage3
from torch import Tensor

from parallel.mesh import MeshShape, ParallelMesh
from parallel.zero import ZeroEngine
from parallel.zero_stage3 import gather_without_copies, reduce_without_interleaving, update_in_one_pass
from tests.distributed.harness import run_distributed
from tests.distributed.test_zero import make_engine, train_step

Found = tuple[list[Tensor], list[float]]


def _messages_of_gpus(engine: ZeroEngine) -> None:
    """What ZeroEngine does on GPUs."""
    gather_without_copies(engine.model)
    reduce_without_interleaving(engine.engine.optimizer)


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
    """And this."""
    _messages_of_gpus(engine)
    for group in engine.optimizer.param_groups:
        group["fused"] = True
    update_in_one_pass(engine.engine.optimizer)


def _differences() -> list[float]:
    """Largest difference of a tensor to DeepSpeed's own in each form, of a norm too, over the largest element."""
    found = []
    for sizes, clipping in (((1, 1, 4), 100.0), ((2, 1, 2), 0.05)):
        mesh = ParallelMesh.create(MeshShape(*sizes))
        with _nothing_replaced():
            theirs, norms = _trained(mesh, clipping)
        with _everything_replaced():
            forms = _trained(mesh, clipping, _messages_of_gpus), _trained(mesh, clipping, _update_with_fused_adamw)
        for ours, our_norms in forms:
            found.append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)))
            found.append(max(abs(a / b - 1) for a, b in zip(our_norms, norms, strict=True)))
            assert all(torch.isfinite(tensor).all() for tensor in ours)
    return found


def test_the_same_numbers_as_deepspeed() -> None:
    for differences in run_distributed(_differences, 4):
        assert max(differences) < 1e-5, differences
