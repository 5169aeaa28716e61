"""Attention replayed from recordings: each backward finds its own forward's, and none is held for a forward whose
results were dropped. What CUDA graphs replay is computed here by the operator itself, into the recording's memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels import KERNELS, AttentionOperator, KernelOperator
from model.kernels.operator import Saved
from parallel import cuda_graphs
from parallel.cuda_graphs import RecordedAttention

SHAPES = (1, 64, 4, 16), (1, 64, 2, 16), (1, 64, 2, 16)


class Recording:
    """`parallel.cuda_graphs._Recording` without CUDA."""

    made = 0

    def __init__(self, operator: AttentionOperator, q: Tensor, k: Tensor, v: Tensor):
        Recording.made += 1
        self.operator, self.inputs, self.dout = operator, (q.clone(), k.clone(), v.clone()), torch.zeros_like(q)
        self.out, self.lse, self.kept = operator.forward(*self.inputs, None)
        self.gradients: Any = tuple(torch.zeros_like(tensor) for tensor in self.inputs)
        self.forward, self.backward = SimpleNamespace(replay=self._forward), SimpleNamespace(replay=self._backward)

    def _forward(self) -> None:
        for static, result in zip((self.out, self.lse), self.operator.forward(*self.inputs, None), strict=False):
            static.copy_(result)

    def _backward(self) -> None:
        saved = Saved(*self.inputs, self.out, self.lse, self.kept, None)
        for static, result in zip(self.gradients, self.operator.backward(self.dout, saved), strict=True):
            static.copy_(result)


@pytest.fixture
def attend(monkeypatch: pytest.MonkeyPatch) -> RecordedAttention:
    monkeypatch.setattr(cuda_graphs, "_Recording", Recording)
    Recording.made = 0
    plain, other = (KernelOperator(KERNELS["math"], scale=0.25) for _ in range(2))
    return RecordedAttention(plain, other)


def gradients(attend: AttentionOperator, inputs: list[Tensor], full: bool, layers: int = 3) -> list[Tensor]:
    """Of a few layers, each on what the one before it gave; recomputed if `full`."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    q, k, v = leaves

    def layer(q: Tensor) -> Tensor:
        return q + attend(q.sin(), k, v, None)

    for _ in range(layers):
        q = checkpoint(layer, q, use_reentrant=False) if full else layer(q)
    return list(torch.autograd.grad(q.square().sum(), leaves))


@pytest.mark.parametrize("full", [False, True])
def test_gradients_are_the_plain_operators(attend: RecordedAttention, full: bool) -> None:
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for found, expected in zip(
            gradients(attend, inputs, full), gradients(attend.plain, inputs, full=False), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_layers_take_recordings_in_turns(attend: RecordedAttention) -> None:
    inputs = [torch.randn(shape) for shape in SHAPES]
    for _ in range(4):
        gradients(attend, inputs, full=False)
    assert Recording.made == 3 and not attend._busy


def test_dropped_results_hold_no_recording(attend: RecordedAttention) -> None:
    """Under full recomputation each layer's first forward has no backward of its own."""
    inputs = [torch.randn(shape) for shape in SHAPES]
    for _ in range(10):
        gradients(attend, inputs, full=True)
    assert Recording.made <= 10 < 30  # as many as addresses at a time, not as forwards
