"""Ring attention over a context-parallel group (arXiv:2310.01889), zigzag-balanced, forward and backward.

Shapes: B batch, L = S / P local tokens, H query heads, K key/value heads, D head_dim.

Keys and values travel un-repeated, packed in one message of [2, B, L, K, D], while the kernel works on the previous
ones. Output and log-sum-exp are merged in fp32 with a max-shifted exponential that tolerates empty rows. dQ, and the dK
and dV that travel with their keys, accumulate in fp32, so the error does not grow with P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels import AttentionKernel, AttentionMask, AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets, placed
from parallel.ring_plan import Call, ring_plan
from parallel.sequence import document_rows


class RingAttention(AttentionOperator):
    """Causal self-attention of sequences whose tokens are spread over `group` (zigzag, see `parallel.sequence`).

    Called with this rank's q [B, L, H, D], k and v [B, L, K, D] and the documents of the full sequences; returns this
    rank's outputs [B, L, H, D].
    """

    def __init__(
        self,
        group: ProcessGroup,
        kernel: AttentionKernel,
        *,
        scale: float,
        window: int | None = None,
        deterministic: bool = False,
    ):
        super().__init__()
        self.group, self.kernel, self.scale = group, kernel, scale
        self.window, self.deterministic = window, deterministic
        self._planned_for: tuple[Any, ...] | None = None
        self._steps: list[list[_BoundCall]] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps = self._plan(q, documents)
        accumulate = torch.promote_types(q.dtype, torch.float32)
        batch, length, heads, _ = q.shape
        running = torch.zeros(q.shape, dtype=accumulate, device=q.device)
        lse = torch.full((batch, heads, length), -torch.inf, dtype=accumulate, device=q.device)
        held = torch.stack([k, v])
        spare = torch.empty_like(held)
        for number, calls in enumerate(steps):
            transfer = _pass_on(held, spare, self.group) if number + 1 < len(steps) else []
            for call in calls:
                part, part_lse = self.kernel.forward(
                    q[call.rows, call.queries],
                    held[0, call.rows, call.keys],
                    held[1, call.rows, call.keys],
                    self.scale,
                    call.mask,
                )
                _merge(running[call.rows, call.queries], lse[call.rows, :, call.queries], part, part_lse)
            for work in transfer:
                work.wait()
            held, spare = spare, held
        return placed(running.to(q.dtype), out), lse, q.new_empty(0)

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        q, k, v, out, lse, _, documents = saved
        steps, dout = self._plan(q, documents), dout.contiguous()
        accumulate = lse.dtype
        dq = torch.zeros(q.shape, dtype=accumulate, device=q.device)
        held = torch.stack([k, v])
        spare = torch.empty_like(held)
        # dK and dV travel one hop behind their keys: they arrive before the step that adds to them ends, and a last hop
        # brings them home.
        gradient = torch.zeros(held.shape, dtype=accumulate, device=held.device)
        spare_gradient = torch.empty_like(gradient)
        arriving: list[dist.Work] = []
        for number, calls in enumerate(steps):
            transfer = _pass_on(held, spare, self.group) if number + 1 < len(steps) else []
            parts = []
            for call in calls:
                rows, queries, keys = call.rows, call.queries, call.keys
                dq_part, dk_part, dv_part = self.kernel.backward(
                    dout[rows, queries],
                    q[rows, queries],
                    held[0, rows, keys],
                    held[1, rows, keys],
                    out[rows, queries],
                    lse[rows, :, queries],
                    self.scale,
                    call.mask,
                    self.deterministic,
                )
                dq[rows, queries] += dq_part
                parts.append((call, dk_part, dv_part))
            if number:
                for work in arriving:
                    work.wait()
                gradient, spare_gradient = spare_gradient, gradient
            for call, dk_part, dv_part in parts:
                gradient[0, call.rows, call.keys] += dk_part
                gradient[1, call.rows, call.keys] += dv_part
            if len(steps) > 1:
                arriving = _pass_on(gradient, spare_gradient, self.group)
            for work in transfer:
                work.wait()
            held, spare = spare, held
        for work in arriving:
            work.wait()
        home = spare_gradient if len(steps) > 1 else gradient
        dq, dk, dv = (
            (like.new_empty(like.shape) if target is None else target).copy_(total)
            for like, total, target in zip((q, k, v), (dq, *home), targets, strict=True)
        )
        return dq, dk, dv

    def _plan(self, q: Tensor, documents: Documents | None) -> list[list[_BoundCall]]:
        """The steps for this batch: made at its first layer, kept for the others."""
        key = (q.shape[:2], q.device, documents)
        if self._planned_for is None or self._planned_for[:2] != key[:2] or self._planned_for[2] is not documents:
            self._steps = _bind(q.shape[0], q.shape[1], self.group, self.window, documents, q.device)
            self._planned_for = key
        return self._steps


@dataclass(frozen=True)
class _BoundCall:
    """A planned call on rows [row_start, row_stop) of the batch, with its mask ready on the device."""

    rows: slice
    queries: slice
    keys: slice
    mask: AttentionMask


def _bind(
    batch: int,
    local_length: int,
    group: ProcessGroup,
    window: int | None,
    documents: Documents | None,
    device: torch.device,
) -> list[list[_BoundCall]]:
    size, rank = group.size(), dist.get_rank(group)
    sequence_length = local_length * size
    if documents is None:
        plans: list[tuple[slice, list[list[Call]]]] = [
            (slice(0, batch), ring_plan(sequence_length, size, rank, window))
        ]
    else:  # each row has documents of its own
        plans = [
            (slice(row, row + 1), ring_plan(sequence_length, size, rank, window, boundaries))
            for row, boundaries in enumerate(document_rows(documents.boundaries, batch, sequence_length))
        ]
    steps: list[list[_BoundCall]] = [[] for _ in range(size)]
    for rows, plan in plans:
        for step, calls in zip(steps, plan, strict=True):
            for call in calls:
                inside = None if call.boundaries is None else Documents.from_boundaries(call.boundaries, device)
                mask = AttentionMask(call.causal, call.window, call.offset, inside)
                queries, keys = slice(call.q_start, call.q_stop), slice(call.k_start, call.k_stop)
                step.append(_BoundCall(rows, queries, keys, mask))
    return steps


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds a partial result to the running one, in place. out [b, s, H, D], lse [b, H, s]; -inf marks an empty row."""
    merged = torch.logaddexp(lse, part_lse)
    shift = merged.masked_fill(merged == -torch.inf, 0)  # exp(-inf - 0) = 0 where both are empty
    old_weight = (lse - shift).exp().transpose(1, 2).unsqueeze(-1)
    new_weight = (part_lse - shift).exp().transpose(1, 2).unsqueeze(-1)
    out.mul_(old_weight).add_(part * new_weight)
    lse.copy_(merged)


def _pass_on(outgoing: Tensor, incoming: Tensor, group: ProcessGroup) -> list[dist.Work]:
    """Starts sending to the next rank of the ring and receiving from the previous one; both in one batch."""
    rank, size = dist.get_rank(group), group.size()
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, outgoing, following, group),
            dist.P2POp(dist.irecv, incoming, previous, group),
        ]
    )
