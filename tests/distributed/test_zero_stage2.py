"""`parallel.zero_stage2` beside what it replaces of DeepSpeed: the same state and norms, padded parts too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from parallel import zero, zero_stage2
from parallel.gradient_exchange import exchange_parts
from parallel.mesh import MeshShape, ParallelMesh
from parallel.tensor import TensorShard
from parallel.zero import ZeroEngine
from parallel.zero_config import ZeroSettings
from parallel.zero_stage2 import clip_as_adamw_reads, exchange_and_accumulate, measure_norm_once
from tests.distributed.harness import run_distributed
from tests.distributed.test_zero import ACCUMULATION, BETAS, make_engine, train_step

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


class _Tiny(nn.Module):
    """Fewer vector elements than ranks: some keep none, and a parameter of four elements is cut."""

    def __init__(self) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(4, 3, generator=numbers))
        self.last = nn.Parameter(torch.randn(5, 4, generator=numbers))
        self.factor = nn.Parameter(torch.randn(1, generator=numbers))
        self.bias = nn.Parameter(torch.randn(1, generator=numbers))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.factor * x @ self.first.t() + self.bias) @ self.last.t()).square().sum()


def _tiny(change: Callable[[ZeroEngine], None]) -> Found:
    mesh, model = ParallelMesh.create(MeshShape(1, 1, 4)), _Tiny()
    shards = {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    settings = ZeroSettings(2, "fp32", 1, ACCUMULATION, 0.5)
    with mock.patch.object(ZeroEngine, "_tune_stage2", lambda engine, sizes: change(engine)):
        engine = ZeroEngine(
            model, shards, mesh, settings, betas=BETAS, eps=1e-8, weight_decay=0.1, device=torch.device("cpu")
        )
    norms = []
    for step in range(2):
        for part in range(ACCUMULATION):
            numbers = torch.Generator().manual_seed(100 * step + 10 * part + mesh.zero_rank)
            engine.backward(engine(torch.randn(4, 3, generator=numbers)))
        assert engine.step(0.01)
        norms.append(float(engine.grad_norm))
    return [parameter.detach().clone() for parameter in model.parameters()], norms


def _tiny_differences() -> float:
    (ours, our_norms), (theirs, norms) = _tiny(partial(_exchanged, 1)), _tiny(_nothing)
    largest = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return max(largest, *(abs(a / b - 1) for a, b in zip(our_norms, norms, strict=True)))


def test_the_same_numbers_as_deepspeed() -> None:
    alone = run_distributed(_differences, 2, {(2, 1, 1): 0.05})
    among_others = run_distributed(_differences, 4, {(1, 1, 4): 100.0, (2, 1, 2): 0.05})
    for differences in alone + among_others:
        assert max(differences) < 1e-5, differences
    assert max(run_distributed(_tiny_differences, 4)) < 1e-5


_AVERAGE = DeepSpeedZeroOptimizer.average_tensor


def _who_reduces(most_ranks: int) -> tuple[bool, bool]:
    """Whether DeepSpeed reduces, and whether gradients are exchanged, where ranks reach each other."""
    with (
        mock.patch.object(zero, "reach_each_other", lambda group, device: True),
        mock.patch.object(zero_stage2, "MOST_RANKS", most_ranks),
        mock.patch.object(zero_stage2, "exchange_parts", side_effect=exchange_parts) as ours,
        mock.patch.object(DeepSpeedZeroOptimizer, "average_tensor", autospec=True, side_effect=_AVERAGE) as theirs,
    ):
        train_step(make_engine(ParallelMesh.create(MeshShape(1, 1, 2)), 2, 0.0))
    return theirs.called, ours.called


def test_few_ranks_that_reach_each_other_exchange() -> None:
    assert run_distributed(_who_reduces, 2, 2) == [(False, True)] * 2
    assert run_distributed(_who_reduces, 2, 1) == [(True, False)] * 2


def _order_of_steps() -> list[str]:
    engine, order = make_engine(ParallelMesh.create(MeshShape(2, 1, 1)), 2, 0.0), []
    engine.optimizer.register_step_pre_hook(lambda *_: order.append("update"))
    with mock.patch.object(zero_stage2._Beside, "join", lambda beside: order.append("join")):
        train_step(engine)
        train_step(engine)
    return order


def _update_with_a_nan_elsewhere() -> tuple[bool, bool]:
    """Whether the update was made, and whether weights are finite, if one rank of tp has a NaN in a gradient that the
    other one counts."""
    engine = make_engine(ParallelMesh.create(MeshShape(2, 1, 1)), 2, 0.05)
    if engine.mesh.tp_rank == 1:
        engine.model.get_parameter("norm.weight").register_hook(lambda gradient: gradient * math.nan)
    with mock.patch.object(engine, "step", return_value=True):
        train_step(engine)
    return engine.step(0.01), all(bool(parameter.isfinite().all()) for parameter in engine.model.parameters())


def test_updates() -> None:
    assert run_distributed(_order_of_steps, 2) == [["join", "update", "update"] * 2] * 2, "two groups, one exchange"
    assert run_distributed(_update_with_a_nan_elsewhere, 2) == [(False, True)] * 2
