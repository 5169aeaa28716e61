"""Replays attention's forward and backward as CUDA graphs.

At a few thousand tokens a rank, the host needs longer to issue attention (a dozen copies, a barrier or two, the kernels
and their Python) than the GPU to run it. A graph is issued at once.

Shapes: B batch, L local tokens, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from model.kernels import AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets


class RecordedAttention(AttentionOperator):
    """`recorded` replayed from CUDA graphs; `plain` where there is nothing to gain or the call changes every time.

    Documents differ from batch to batch and calls without gradients keep nothing: both go to `plain`. The two must
    compute the same but share no transport: a graph remembers which slots it used. So the ranks of a group must take
    the same recordings in the same order.

    Every forward whose backward is still to come holds a recording of its own (inputs, results and what is kept), so a
    model needs as many as layers are alive between forward and backward. Under full recomputation that is one: a
    recording is known by the LSE that it gave, and once that is gone its backward cannot come. What lives is the same
    on every rank, unlike the addresses that an allocator gives.

    All that a call returns is a tensor of its own, and what is kept stays in the recording: a compiler writes to what
    it was given and needs no more.
    """

    def __init__(self, plain: AttentionOperator, recorded: AttentionOperator):
        super().__init__()
        self.plain, self.recorded = plain, recorded
        self._idle: dict[tuple[Any, ...], list[_Recording]] = defaultdict(list)
        self._busy: dict[int, tuple[tuple[Any, ...], _Recording, StorageWeakRef]] = {}
        """By the address of the LSE that a forward returned: shapes, recording, and whether that LSE is still alive."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        alike = documents is None and torch.is_grad_enabled()
        return super().__call__(q, k, v, None) if alike else self.plain(q, k, v, documents)

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.recorded.saved_shapes(q, k)[0], (0,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert documents is None, "calls with documents go to `plain`"
        for address in [address for address, (*_, given) in self._busy.items() if given.expired()]:
            self._release(address)  # of a forward whose results are gone
        key = q.shape, k.shape, q.dtype
        lse = q.new_empty(self.saved_shapes(q, k)[0], dtype=torch.promote_types(q.dtype, torch.float32))
        recording = self._idle[key].pop() if self._idle[key] else _Recording(self.recorded, q, k, v)
        self._busy[lse.data_ptr()] = key, recording, StorageWeakRef(lse.untyped_storage())
        for static, given in zip(recording.inputs, (q, k, v), strict=True):
            static.copy_(given)
        recording.forward.replay()
        out = q.new_empty(q.shape) if out is None else out
        return out.copy_(recording.out), lse.copy_(recording.lse), q.new_empty(0)

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        recording = self._release(saved.lse.data_ptr())
        recording.dout.copy_(dout)
        recording.backward.replay()
        dq, dk, dv = (
            (like.new_empty(like.shape) if target is None else target).copy_(static)
            for like, target, static in zip(saved[:3], targets, recording.gradients, strict=True)
        )
        return dq, dk, dv

    def _release(self, address: int) -> _Recording:
        """The recording that gave the LSE at this address: from now on another forward may take it."""
        key, recording, _ = self._busy.pop(address)
        self._idle[key].append(recording)
        return recording


class _Recording:
    """One forward and its backward over memory of their own. Made by all ranks at once, as all calls are."""

    def __init__(self, operator: AttentionOperator, q: Tensor, k: Tensor, v: Tensor):
        self.inputs = q.clone(), k.clone(), v.clone()
        self.dout = torch.zeros_like(q)
        self._run(operator, *self.inputs)  # compiles kernels and makes room, which a graph cannot
        torch.cuda.synchronize(q.device)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: one page-locks the next batch, which would break off any other capture.
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
            self.out, self.lse, self.kept = operator.forward(*self.inputs, None)
        with torch.cuda.graph(self.backward, capture_error_mode="thread_local"):
            self.gradients = self._gradients(operator, *self.inputs)

    def _run(self, operator: AttentionOperator, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.out, self.lse, self.kept = operator.forward(q, k, v, None)
        self._gradients(operator, q, k, v)

    def _gradients(self, operator: AttentionOperator, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        return operator.backward(self.dout, Saved(q, k, v, self.out, self.lse, self.kept, None))
