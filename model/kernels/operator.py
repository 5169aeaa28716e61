"""Causal self-attention as one operator: autograd, compilers and recomputation treat it as a unit.

Shapes: B batch, S tokens of a row on this device, H query heads, K key/value heads, D head_dim.

`ringzero::attention` is registered with torch.library, so that a compiled block calls it without looking inside and a
recomputation policy can name it. Its outputs (out, lse, kept) are what its backward needs beside q, k and v, so
attention never runs twice. Operators take only numbers and tensors. `number` says which `AttentionOperator` runs;
`lse_shape` and `kept_shape` say what it returns. The shapes are arguments because torch keeps compiled graphs on disk,
and only arguments tell them apart: operators of two runs may share a number and differ in what they keep.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.mask import AttentionMask, Documents
from model.kernels.protocol import AttentionKernel, Gradients, Targets

NO_TARGETS: Targets = (None, None, None)


class Saved(NamedTuple):
    """What a backward gets from its forward: the inputs and the results."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    kept: Tensor
    documents: Documents | None


class AttentionOperator(ABC):
    """Causal self-attention, windowed and cut into documents as configured, forward and backward without autograd.

    Called like a function it is differentiable: (q [B, S, H, D], k and v [B, S, K, D], documents) -> [B, S, H, D].
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._documents: Documents | None = None
        _operators[self.number] = self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        boundaries = cu_seqlens = None
        if documents is not None:
            boundaries, cu_seqlens = documents.host, documents.cu_seqlens
        return attention_op(q, k, v, boundaries, cu_seqlens, self.number, *self.saved_shapes(q, k))[0]

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out [B, S, H, D], lse, kept): fresh tensors, but for `out` where a place is given.

        `lse` and `kept` are of the shapes that `saved_shapes` names, for this operator's backward alone.
        """

    @abstractmethod
    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        """dq, dk, dv of sum(dout * out): in `targets` where given, else in tensors of their own."""

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `lse` (fp32, or fp64 for fp64 inputs) and of `kept` (in q's dtype)."""
        return (q.shape[0], q.shape[2], q.shape[1]), (0,)

    def documents(self, boundaries: Tensor | None, cu_seqlens: Tensor | None) -> Documents | None:
        """The documents of these tensors; a model's layers ask for the same ones one after the other."""
        if boundaries is None or cu_seqlens is None:
            return None
        if self._documents is None or self._documents.host is not boundaries:
            self._documents = Documents.from_tensors(boundaries, cu_seqlens)
        return self._documents


class KernelOperator(AttentionOperator):
    """One kernel call over the whole sequence."""

    def __init__(
        self, kernel: AttentionKernel, *, scale: float, window: int | None = None, deterministic: bool = False
    ):
        super().__init__()
        self.kernel, self.scale, self.window, self.deterministic = kernel, scale, window, deterministic

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = self.kernel.forward(q, k, v, self.scale, self._mask(documents), out)
        return out, lse.contiguous(), q.new_empty(0)

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        q, k, v, out, lse, _, documents = saved
        mask = self._mask(documents)
        return self.kernel.backward(dout, q, k, v, out, lse, self.scale, mask, self.deterministic, *targets)

    def _mask(self, documents: Documents | None) -> AttentionMask:
        return AttentionMask(causal=True, window=self.window, documents=documents)


_numbers = itertools.count()
_operators: weakref.WeakValueDictionary[int, AttentionOperator] = weakref.WeakValueDictionary()
"""Live operators by number."""


# The decorator torch.library.custom_op costs a third of a millisecond a layer in checks; this is the same, by hand.
_library = torch.library.Library("ringzero", "DEF")
_DOCUMENTS = "Tensor? boundaries, Tensor? cu_seqlens, int number"
_library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_DOCUMENTS}, SymInt[] lse_shape, SymInt[] kept_shape) -> "
    "(Tensor out, Tensor lse, Tensor kept)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor kept, "
    f"{_DOCUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
attention_op = torch.ops.ringzero.attention.default
"""(out, lse, kept) of operator `number`; `boundaries` (on the host) and `cu_seqlens` name the documents."""
attention_backward_op = torch.ops.ringzero.attention_backward.default


def _forward(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor | None, cu_seqlens: Tensor | None, number: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    operator = _operators[number]
    out, lse, kept = operator.forward(q, k, v, operator.documents(boundaries, cu_seqlens))
    return out.contiguous(), lse.contiguous(), kept  # as `_forward_shapes` tells a compiler


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    boundaries: Tensor | None,
    cu_seqlens: Tensor | None,
    number: int,
) -> Gradients:
    operator = _operators[number]
    saved = Saved(q, k, v, out, lse, kept, operator.documents(boundaries, cu_seqlens))
    dq, dk, dv = operator.backward(dout, saved)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, lse_shape, kept_shape = rest
    lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse, q.new_empty(kept_shape)


def _backward_shapes(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            saved = attention_op(*inputs)
        q, k, v, boundaries, cu_seqlens, ctx.number, *_ = inputs
        ctx.save_for_backward(q, k, v, *saved, boundaries, cu_seqlens)
        ctx.mark_non_differentiable(*saved[1:])
        ctx.set_materialize_grads(False)
        return saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *attention_backward_op(grads[0], *ctx.saved_tensors, ctx.number), *[None] * 5


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention", lambda *inputs: _Differentiable.apply(*inputs), "Autograd")
torch.library.register_fake("ringzero::attention", _forward_shapes, lib=_library)
torch.library.register_fake("ringzero::attention_backward", _backward_shapes, lib=_library)
