"""Context-parallel attention by exchange: each rank fetches the keys its queries see, then attends once
(`exchange_plan`).

Shapes: B batch, L = S / P local tokens, H query heads, K key/value heads, D head_dim, M buffer length.

Keys and values lie interleaved in one buffer [M, 2, B, K, D], so that a piece of both is one contiguous message. In the
backward pass gradients travel back to the owners of the keys in the same way (`key_gradients`). The kernel sees all
keys of a query at once, so its output, LSE and dQ are final.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import AttentionKernel, AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets
from parallel.exchange_calls import BatchPlans, PlannedCall, PlannedRows
from parallel.fused import pack_keys
from parallel.key_gradients import KeyGradients, sides
from parallel.key_layout import buffer_room
from parallel.transport import Arrival, Transport


class _GatheredKeys(NamedTuple):
    """The keys of some rows, on their way."""

    rows: PlannedRows
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
        self.window, self.deterministic, self.keep_gathered = window, deterministic, keep_gathered
        self.size, self.rank = transport.group.size(), transport.rank
        self.plans = BatchPlans(
            self.size,
            self.rank,
            window=window,
            balanced=balanced,
            cut_window=window if cut_by_window else None,
            joined=joined,
            takes_documents=kernel.capabilities.documents,
        )

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`kept` has room for all keys that the window leaves: documents decide how much of it is used."""
        kept = 0
        if self.keep_gathered:
            room = buffer_room(k.shape[1] * self.size, self.size, self.window, self.plans.joins(q))
            kept = 2 * room * math.prod(k.shape[2:]) * k.shape[0]
        return (q.shape[0], q.shape[2], q.shape[1]), (kept,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty(q.shape) if out is None else out
        lse_shape, kept_shape = self.saved_shapes(q, k)
        kept = k.new_empty(kept_shape)
        planned = self.plans.of(q, documents)
        lse = torch.empty(0)
        if sum(len(rows.calls) for rows in planned) > 1:
            lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
        gathered = self._gather(planned, k, v, kept)
        for remote in (False, True):  # first what needs no peer
            for keys in gathered:
                if remote:
                    keys.complete()
                for call in keys.rows.calls:
                    if call.remote != remote:
                        continue
                    _, part = self.kernel.forward(
                        _part(q, call.queries),
                        *_some(keys.sides, call.keys),
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
        planned = self.plans.of(q, documents)
        if self.keep_gathered:
            gathered = [
                _GatheredKeys(rows, buffer, sides(buffer), None) for rows, buffer in self._buffers(planned, k, kept)
            ]
        else:
            gathered = self._gather(planned, k, v, kept)
        dq, dk, dv = (
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        )
        under_way: list[tuple[slice | None, KeyGradients]] = []

        def collect_one() -> None:
            of_batch, gradients = under_way.pop(0)
            gradients.collect(*(x if of_batch is None else x[of_batch] for x in (dk, dv)))

        for keys in gathered:
            keys.complete()
            rows, buffer = keys.rows, keys.buffer
            if len(under_way) == 2:  # their slots are still to be read, and a transport has few
                collect_one()
            gradients = KeyGradients(self.transport, rows.plan, buffer)
            for number, call in enumerate(rows.calls):
                with gradients.of(call.keys) as (dk_part, dv_part):
                    self._backward_call(call, keys.sides, dout, saved, (dq, dk_part, dv_part))
                if number == 0 and not any(later.remote for later in rows.calls[1:]):
                    gradients.send_home()  # what peers wait for is complete; the rest is computed meanwhile
            gradients.send_home()
            under_way.append((rows.of_batch, gradients))
        while under_way:
            collect_one()
        return dq, dk, dv

    def _backward_call(
        self, call: PlannedCall, keys: tuple[Tensor, Tensor], dout: Tensor, saved: Saved, targets: Gradients
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

    def _buffers(self, planned: list[PlannedRows], k: Tensor, kept: Tensor) -> list[tuple[PlannedRows, Tensor]]:
        """A buffer for each of `planned`: parts of `kept` if that has room."""
        found, used = [], 0
        for rows in planned:
            shape = (rows.plan.buffer_length, 2, k.shape[0] if rows.of_batch is None else 1, *k.shape[2:])
            size = math.prod(shape)
            found.append((rows, (kept[used : used + size] if self.keep_gathered else k.new_empty(size)).view(shape)))
            used += size
        return found

    def _gather(self, planned: list[PlannedRows], k: Tensor, v: Tensor, kept: Tensor) -> list[_GatheredKeys]:
        """Starts to fetch the keys that peers hold, straight to their places in the buffers, and to serve theirs."""
        return [self._fetch(rows, buffer, k, v) for rows, buffer in self._buffers(planned, k, kept)]

    def _fetch(self, rows: PlannedRows, buffer: Tensor, k: Tensor, v: Tensor) -> _GatheredKeys:
        plan = rows.plan
        if rows.of_batch is not None:
            k, v = k[rows.of_batch], v[rows.of_batch]
        slot = self.transport.slot((k.shape[1], *buffer.shape[1:]), k)
        pack_keys(k, v, slot, buffer, plan.own, plan.own_again)

        def taken(owner: int, reader: int) -> list[slice]:
            pieces = plan.receives.get(owner, ()) if reader == self.rank else plan.sends.get(reader, ())
            return [piece.local for piece in pieces]

        def place(owner: int, parts: list[Tensor]) -> None:
            for piece, part in zip(plan.receives.get(owner, ()), parts, strict=True):
                buffer[piece.at_receiver].copy_(part)

        return _GatheredKeys(rows, buffer, sides(buffer), self.transport.exchange(slot, taken, place))


def _part(tensor: Tensor, queries: tuple[slice, slice] | None) -> Tensor:
    """Some rows and tokens of [B, L, H, D]."""
    return tensor if queries is None else tensor[queries]


def _some(both: tuple[Tensor, Tensor], keys: slice | None) -> tuple[Tensor, Tensor]:
    """Some of the keys and values [B, M, K, D]."""
    k, v = both
    return both if keys is None else (k[:, keys], v[:, keys])
