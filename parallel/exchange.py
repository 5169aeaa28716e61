"""Context-parallel attention by exchange: each rank fetches the keys its queries see, then attends once
(`exchange_plan`).

Shapes: B batch, L = S / P local tokens, H query heads, K key/value heads, D head_dim, M buffer length.

Keys and values lie interleaved in one buffer [M, 2, B, K, D], so that a piece of both is one contiguous message. In the
backward pass gradients travel back to the owners of the keys in the same way (`key_gradients`). The kernel sees all
keys of a query at once, so its output, LSE and dQ are final.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import AttentionKernel, AttentionMask, AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets
from parallel.exchange_plan import ExchangeCall, ExchangePlan, buffer_room, exchange_plan, one_call_is_faster
from parallel.fused import pack_keys
from parallel.key_gradients import KeyGradients, sides
from parallel.sequence import balanced_parts, causal_parts, document_rows
from parallel.transport import Arrival, Transport


@dataclass(frozen=True)
class _Call:
    """A planned kernel call with its mask on the device; None stands for all there are."""

    queries: tuple[slice, slice] | None
    """Rows of the batch and local tokens."""
    keys: slice | None
    mask: AttentionMask
    remote: bool


@dataclass(frozen=True)
class _Rows:
    """Rows of the batch that share a plan: all of them, or one row with documents of its own."""

    rows: slice | None
    plan: ExchangePlan
    calls: list[_Call]


class _Job(NamedTuple):
    """The keys of some rows, on their way."""

    rows: _Rows
    buffer: Tensor
    """[M, 2, B, K, D]."""
    sides: tuple[Tensor, Tensor]
    """Its keys and values [B, M, K, D]."""
    arrival: Arrival | None

    def complete(self) -> None:
        """Work issued from now on finds all keys in the buffer, those that lie twice in both places."""
        if self.arrival is None:
            return
        self.arrival.wait()
        if (copied := self.rows.plan.copied) is not None:
            first, second = copied
            self.buffer[second].copy_(self.buffer[first])


class ExchangeAttention(AttentionOperator):
    """Causal self-attention of tokens spread over the transport's group (see `parallel.sequence`).

    Called with this rank's q [B, L, H, D], k and v [B, L, K, D] and the documents of the full sequences; returns this
    rank's outputs [B, L, H, D]. `balanced` says that sequences were cut by `balanced_parts`, without documents by
    `causal_parts`: for this `window` or, where `cut_by_window` is false, for layers that have none. `keep_gathered`
    keeps fetched keys and values for the backward pass; otherwise they are fetched again. `joined` lets one kernel call
    serve both of a rank's chunks, or not; None takes what is faster.
    """

    def __init__(
        self,
        transport: Transport,
        kernel: AttentionKernel,
        *,
        scale: float,
        window: int | None = None,
        deterministic: bool = False,
        balanced: bool = False,
        cut_by_window: bool = True,
        keep_gathered: bool = True,
        joined: bool | None = None,
    ):
        super().__init__()
        self.transport, self.kernel, self.scale = transport, kernel, scale
        self.window, self.deterministic = window, deterministic
        self.balanced, self.keep_gathered, self.joined = balanced, keep_gathered, joined
        self.cut_window = window if cut_by_window else None
        self.size, self.rank = transport.group.size(), transport.rank
        self._planned_for: Documents | None = None
        self._planned: dict[tuple[int, ...], list[_Rows]] = {}
        """Plans by shape: a trade of heads around this has groups of several sizes."""

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`kept` has room for all keys that the window leaves: documents decide how much of it is used."""
        kept = 0
        if self.keep_gathered:
            room = buffer_room(k.shape[1] * self.size, self.size, self.window, self._joins(q))
            kept = 2 * room * math.prod(k.shape[2:]) * k.shape[0]
        return (q.shape[0], q.shape[2], q.shape[1]), (kept,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty(q.shape) if out is None else out
        lse_shape, kept_shape = self.saved_shapes(q, k)
        kept = k.new_empty(kept_shape)
        planned = self._rows(q, documents)
        lse = torch.empty(0)
        if sum(len(rows.calls) for rows in planned) > 1:
            lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
        jobs = self._gather(planned, k, v, kept)
        for remote in (False, True):  # first what needs no peer
            for job in jobs:
                if remote:
                    job.complete()
                for call in job.rows.calls:
                    if call.remote != remote:
                        continue
                    _, part = self.kernel.forward(
                        _part(q, call.queries),
                        *_some(job.sides, call.keys),
                        self.scale,
                        call.mask,
                        out=_part(out, call.queries),
                    )
                    if call.queries is None:
                        lse = part
                    else:
                        lse[call.queries[0], :, call.queries[1]] = part
        return out, lse, kept

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        q, k, v, _, _, kept, documents = saved
        planned = self._rows(q, documents)
        if self.keep_gathered:
            jobs = [_Job(rows, buffer, sides(buffer), None) for rows, buffer in self._buffers(planned, k, kept)]
        else:
            jobs = self._gather(planned, k, v, kept)
        dq, dk, dv = (
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        )
        under_way: list[tuple[slice | None, KeyGradients]] = []

        def collect_one() -> None:
            batch_rows, of_keys = under_way.pop(0)
            of_keys.collect(*(x if batch_rows is None else x[batch_rows] for x in (dk, dv)))

        for job in jobs:
            job.complete()
            rows, buffer = job.rows, job.buffer
            if len(under_way) == 2:  # their slots are still to be read, and a transport has few
                collect_one()
            of_keys = KeyGradients(self.transport, rows.plan, buffer)
            for call, *rest in (rows.calls[number:] for number in range(len(rows.calls))):
                with of_keys.of(call.keys) as (dk_part, dv_part):
                    self._backward_call(call, job.sides, dout, saved, (dq, dk_part, dv_part))
                if call is rows.calls[0] and not any(later.remote for later in rest):
                    of_keys.send_home()  # what peers wait for is complete; the rest is computed meanwhile
            of_keys.send_home()
            under_way.append((rows.rows, of_keys))
        while under_way:
            collect_one()
        return dq, dk, dv

    def _backward_call(
        self, call: _Call, keys: tuple[Tensor, Tensor], dout: Tensor, saved: Saved, targets: Gradients
    ) -> None:
        """Computes one call's gradients in their places: dk and dv are those of its keys alone."""
        lse = saved.lse if call.queries is None else saved.lse[call.queries[0], :, call.queries[1]]
        self.kernel.backward(
            _part(dout, call.queries),
            _part(saved.q, call.queries),
            *_some(keys, call.keys),
            _part(saved.out, call.queries),
            lse,
            self.scale,
            call.mask,
            self.deterministic,
            dq=_part(targets[0], call.queries),
            dk=targets[1],
            dv=targets[2],
        )

    def _buffers(self, planned: list[_Rows], k: Tensor, kept: Tensor) -> list[tuple[_Rows, Tensor]]:
        """A buffer for each of `planned`: parts of `kept` if that has room."""
        found, used = [], 0
        for rows in planned:
            shape = (rows.plan.buffer_length, 2, k.shape[0] if rows.rows is None else 1, *k.shape[2:])
            size = math.prod(shape)
            found.append((rows, (kept[used : used + size] if self.keep_gathered else k.new_empty(size)).view(shape)))
            used += size
        return found

    def _gather(self, planned: list[_Rows], k: Tensor, v: Tensor, kept: Tensor) -> list[_Job]:
        """Starts to fetch the keys that peers hold, straight to their places in the buffers, and to serve theirs."""
        return [self._fetch(rows, buffer, k, v) for rows, buffer in self._buffers(planned, k, kept)]

    def _fetch(self, rows: _Rows, buffer: Tensor, k: Tensor, v: Tensor) -> _Job:
        plan = rows.plan
        if rows.rows is not None:
            k, v = k[rows.rows], v[rows.rows]
        slot = self.transport.slot((k.shape[1], *buffer.shape[1:]), k)
        pack_keys(k, v, slot, buffer, plan.own, plan.own_again)

        def taken(owner: int, reader: int) -> list[slice]:
            pieces = plan.receives.get(owner, ()) if reader == self.rank else plan.sends.get(reader, ())
            return [piece.local for piece in pieces]

        def place(owner: int, parts: list[Tensor]) -> None:
            for piece, part in zip(plan.receives.get(owner, ()), parts, strict=True):
                buffer[piece.at_receiver].copy_(part)

        return _Job(rows, buffer, sides(buffer), self.transport.exchange(slot, taken, place))

    def _rows(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        """The plan for this batch: made at its first layer, kept for the others."""
        if self._planned_for is not documents:
            self._planned, self._planned_for = {}, documents
        shape = q.shape[:3]
        if shape not in self._planned:
            self._planned[shape] = self._plan(q, documents)
        return self._planned[shape]

    def _plan(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        size, batch = self.size, q.shape[0]
        length = q.shape[1] * size
        joined = self._joins(q)
        if documents is None:
            # The keys of a batch do not lie one row after the other, as documents would have to.
            parts = causal_parts(length, size, q.shape[2] * batch, self.cut_window) if self.balanced else None
            plan = exchange_plan(length, size, self.rank, self.window, None, parts, joined and batch == 1)
            return [_Rows(None, plan, self._calls(plan, None, q))]
        plans = []
        for boundaries in document_rows(documents.boundaries, batch, length):
            parts = balanced_parts(length, size, boundaries, self.cut_window) if self.balanced else None
            plans.append(exchange_plan(length, size, self.rank, self.window, boundaries, parts, joined))
        largest = max(plan.largest_buffer for plan in plans)  # a slot must not outgrow those before it while in use
        rows = []
        for row, plan in enumerate(plans):
            batch_rows = slice(row, row + 1) if batch > 1 else None
            calls = self._calls(plan, batch_rows, q)
            rows.append(_Rows(batch_rows, replace(plan, largest_buffer=largest), calls))
        return rows

    def _joins(self, q: Tensor) -> bool:
        """Whether one call may serve both chunks of a sequence. Decided by shapes, hence alike on all ranks."""
        if not self.kernel.capabilities.documents:
            return False
        return one_call_is_faster(q.shape[2], q.shape[1]) if self.joined is None else self.joined

    def _calls(self, plan: ExchangePlan, rows: slice | None, q: Tensor) -> list[_Call]:
        calls = []
        for call in plan.calls:
            queries = None
            if rows is not None or call.q_stop - call.q_start < q.shape[1]:
                queries = rows or slice(0, q.shape[0]), slice(call.q_start, call.q_stop)
            keys = slice(call.k_start, call.k_stop) if call.k_stop - call.k_start < plan.buffer_length else None
            calls.append(_Call(queries, keys, self._mask(call, q.device), call.remote))
        return calls

    def _mask(self, call: ExchangeCall, device: torch.device) -> AttentionMask:
        if call.query_bounds is None or call.key_bounds is None:
            offset = (call.k_stop - call.k_start) - (call.q_stop - call.q_start)
            return AttentionMask(causal=True, window=self.window, offset=offset)
        return AttentionMask(
            causal=True,
            window=self.window,
            documents=Documents.from_boundaries(call.query_bounds, device),
            key_documents=Documents.from_boundaries(call.key_bounds, device),
        )


def _part(tensor: Tensor, queries: tuple[slice, slice] | None) -> Tensor:
    """Some rows and tokens of [B, L, H, D]."""
    return tensor if queries is None else tensor[queries]


def _some(both: tuple[Tensor, Tensor], keys: slice | None) -> tuple[Tensor, Tensor]:
    """Some of the keys and values [B, M, K, D]."""
    k, v = both
    return both if keys is None else (k[:, keys], v[:, keys])
