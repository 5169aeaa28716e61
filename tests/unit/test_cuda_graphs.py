"""Attention replayed from recordings: each backward finds its own forward's, and none is held for a forward whose
results were dropped, the same ones whatever addresses an allocator gives. What CUDA graphs replay is computed here by
the operator itself, into the recording's memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels import KERNELS, AttentionOperator, Documents, KernelOperator
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets
from parallel import cuda_graphs
from parallel.cuda_graphs import RecordedAttention

SHAPES = (1, 64, 4, 16), (1, 64, 2, 16), (1, 64, 2, 16)


class Recording:
    """`parallel.cuda_graphs._Recording` without CUDA."""

    made = 0
    replayed: ClassVar[list[int]] = []

    def __init__(self, operator: AttentionOperator, q: Tensor, k: Tensor, v: Tensor):
        self.number, Recording.made = Recording.made, Recording.made + 1
        self.operator, self.inputs, self.dout = operator, (q.clone(), k.clone(), v.clone()), torch.zeros_like(q)
        self.out, self.lse, self.kept = operator.forward(*self.inputs, None)
        self.gradients: Any = tuple(torch.zeros_like(tensor) for tensor in self.inputs)
        self.forward, self.backward = SimpleNamespace(replay=self._forward), SimpleNamespace(replay=self._backward)

    def _forward(self) -> None:
        Recording.replayed.append(self.number)
        results = self.operator.forward(*self.inputs, None)
        for static, result in zip((self.out, self.lse, self.kept), results, strict=True):
            static.copy_(result)

    def _backward(self) -> None:
        saved = Saved(*self.inputs, self.out, self.lse, self.kept, None)
        for static, result in zip(self.gradients, self.operator.backward(self.dout, saved), strict=True):
            static.copy_(result)


class Keeping(KernelOperator):
    """Keeps k and v for its backward, as an exchange does."""

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return super().saved_shapes(q, k)[0], (2, *k.shape)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *super().forward(q, k, v, documents, out)[:2], torch.stack([k, v])

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        return super().backward(dout, saved._replace(k=saved.kept[0], v=saved.kept[1]), targets)


@pytest.fixture
def attend(monkeypatch: pytest.MonkeyPatch) -> RecordedAttention:
    monkeypatch.setattr(cuda_graphs, "_Recording", Recording)
    Recording.made = 0
    Recording.replayed.clear()
    plain, other = (Keeping(KERNELS["math"], scale=0.25) for _ in range(2))
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
    for _ in range(4):
        gradients(attend, inputs, full=True)
    assert Recording.made == 1


@pytest.mark.parametrize("full", [False, True])
def test_ranks_with_other_addresses_take_the_same_recordings(attend: RecordedAttention, full: bool) -> None:
    """Else one would read in slots that its peers do not fill, or make a recording that they do not make."""
    taken, inputs, held = [], [torch.randn(shape) for shape in SHAPES], []
    for rank in range(2):
        ranks_own = RecordedAttention(attend.plain, attend.recorded)
        Recording.made = 0
        Recording.replayed.clear()
        for step in range(4):
            if rank > 0:
                held.append([torch.empty_like(inputs[0]) for _ in range(step)])
            gradients(ranks_own, inputs, full, layers=4)
            if rank > 0:  # what is freed may come again
                del held[-1][::2]
        taken.append(list(Recording.replayed))
    assert taken[0] == taken[1] and len(taken[0]) == 4 * 4 * (1 + full)


def test_results_are_nobody_elses(attend: RecordedAttention) -> None:
    """A compiled backward pass writes its own results over what it has no more need of, and the next call comes
    before these are used."""
    inputs = [torch.randn(shape) for shape in SHAPES]
    results = attend.forward(inputs[0], inputs[1], inputs[2], None)
    shapes = [tuple(result.shape) for result in results[1:]]
    assert shapes == list(attend.saved_shapes(inputs[0], inputs[1]))
    attend.backward(torch.ones(SHAPES[0]), Saved(*inputs, *results, None))  # type: ignore[arg-type]
    for result in results:
        result.fill_(7)
    attend.forward(inputs[0], inputs[1], inputs[2], None)
    assert Recording.made == 1 and all(bool((result == 7).all()) for result in results)


def test_documents_go_to_the_plain_operator(attend: RecordedAttention) -> None:
    documents = Documents.from_boundaries((0, 20, 64), "cpu")
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in SHAPES)
    found = attend(q, k, v, documents)
    expected = attend.plain(q, k, v, documents)
    assert torch.equal(found, expected) and Recording.made == 0
    for one, other in zip(
        torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        assert torch.equal(one, other)
