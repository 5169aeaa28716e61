"""Context-parallel attention by exchange: each rank fetches the keys its queries see, then attends once
(`exchange_plan`).

Shapes: B batch, L = S / P local tokens, H query heads, K key/value heads, D head_dim, M buffer length.

Keys and values lie interleaved in one buffer [M, 2, B, K, D], so that a piece of both is one contiguous message; in the
backward pass gradients travel back to the owners of the keys in the same manner. The kernel sees all keys of a query at
once: its output, LSE and dQ are final. An owner adds up dK and dV in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import AttentionKernel, AttentionMask, AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets
from parallel.exchange_plan import ExchangePlan, Piece, exchange_plan
from parallel.transport import Arrival, Transport


@dataclass(frozen=True)
class _Call:
    """A planned kernel call with its mask on the device."""

    queries: slice
    keys: slice
    mask: AttentionMask
    remote: bool


@dataclass(frozen=True)
class _Rows:
    """Rows of the batch that share a plan: all of them, or one row with documents of its own."""

    rows: slice
    plan: ExchangePlan
    calls: list[_Call]


class _Job(NamedTuple):
    """The keys of some rows, on their way."""

    rows: _Rows
    buffer: Tensor
    """[M, 2, B, K, D], complete once they have arrived."""
    arrival: Arrival | None


class ExchangeAttention(AttentionOperator):
    """Causal self-attention of tokens spread over the transport's group (zigzag, see `parallel.sequence`).

    Called with this rank's q [B, L, H, D], k and v [B, L, K, D] and the documents of the full sequences; returns this
    rank's outputs [B, L, H, D]. `keep_gathered` keeps fetched keys and values for the backward pass; otherwise they are
    fetched again.
    """

    def __init__(
        self,
        transport: Transport,
        kernel: AttentionKernel,
        *,
        scale: float,
        window: int | None = None,
        deterministic: bool = False,
        keep_gathered: bool = True,
    ):
        super().__init__()
        self.transport, self.kernel, self.scale = transport, kernel, scale
        self.window, self.deterministic, self.keep_gathered = window, deterministic, keep_gathered
        self.size, self.rank = transport.group.size(), transport.rank
        self._shape: tuple[int, int] = (0, 0)
        self._planned_for: Documents | None = None
        self._planned: list[_Rows] = []

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`kept` has room for the keys and values of whole sequences: documents decide how much of it is used."""
        kept = 2 * k.numel() * self.size if self.keep_gathered else 0
        return (q.shape[0], q.shape[2], q.shape[1]), (kept,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty(q.shape) if out is None else out
        lse_shape, kept_shape = self.saved_shapes(q, k)
        lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
        kept = k.new_empty(kept_shape)
        jobs = self._gather(self._rows(q, documents), k, v, kept)
        for remote in (False, True):  # first what needs no peer
            for rows, buffer, arrival in jobs:
                if remote and arrival is not None:
                    arrival.wait()
                for call in rows.calls:
                    if call.remote == remote:
                        inside = rows.rows, call.queries
                        _, part = self.kernel.forward(
                            q[inside], *_keys_and_values(buffer, call.keys), self.scale, call.mask, out=out[inside]
                        )
                        lse[rows.rows, :, call.queries] = part
        return out, lse, kept

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        q, k, v, out, lse, kept, documents = saved
        planned = self._rows(q, documents)
        if self.keep_gathered:
            jobs = [_Job(rows, buffer, None) for rows, buffer in self._buffers(planned, k, kept)]
        else:
            jobs = self._gather(planned, k, v, kept)
        dq, dk, dv = (
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        )
        shares = []
        for rows, buffer, arrival in jobs:
            if arrival is not None:
                arrival.wait()
            share = _KeyGradients(self.transport, rows.plan, buffer)
            for call in rows.calls:
                if not call.remote:
                    share.send_home()  # what peers wait for is complete; the rest is computed meanwhile
                share.add(call.keys, self._backward_call(rows.rows, call, buffer, dout, q, out, lse, dq))
            share.send_home()
            shares.append((rows.rows, share))
        for batch_rows, share in shares:
            share.collect(dk[batch_rows], dv[batch_rows])
        return dq, dk, dv

    def _backward_call(
        self, rows: slice, call: _Call, buffer: Tensor, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, dq: Tensor
    ) -> Callable[[Tensor, Tensor], object]:
        """What computes one call's gradients: dq in its place, dk and dv where the caller says."""
        inside = rows, call.queries
        k, v = _keys_and_values(buffer, call.keys)
        return lambda dk, dv: self.kernel.backward(
            dout[inside],
            q[inside],
            k,
            v,
            out[inside],
            lse[rows, :, call.queries],
            self.scale,
            call.mask,
            self.deterministic,
            dq=dq[inside],
            dk=dk,
            dv=dv,
        )

    def _buffers(self, planned: list[_Rows], k: Tensor, kept: Tensor) -> list[tuple[_Rows, Tensor]]:
        """A buffer for each of `planned`: parts of `kept` if that has room."""
        found, used = [], 0
        for rows in planned:
            shape = (rows.plan.buffer_length, 2, k[rows.rows].shape[0], *k.shape[2:])
            size = math.prod(shape)
            found.append((rows, (kept[used : used + size] if self.keep_gathered else k.new_empty(size)).view(shape)))
            used += size
        return found

    def _gather(self, planned: list[_Rows], k: Tensor, v: Tensor, kept: Tensor) -> list[_Job]:
        """Starts to fetch the keys that peers hold, straight to their places in the buffers, and to serve theirs."""
        jobs = []
        for rows, buffer in self._buffers(planned, k, kept):
            plan = rows.plan
            slot = self.transport.slot((1, k.shape[1], *buffer.shape[1:]), k)
            pair = k[rows.rows].transpose(0, 1), v[rows.rows].transpose(0, 1)
            torch.stack(pair, dim=1, out=slot[0])
            for local, index, length in plan.own:
                buffer[index : index + length].copy_(slot[0, local : local + length])

            def taken(owner: int, reader: int, plan: ExchangePlan = plan) -> list[slice]:
                pieces = plan.receives.get(owner, ()) if reader == self.rank else plan.sends.get(reader, ())
                return [slice(piece.owner_local, piece.owner_local + piece.length) for piece in pieces]

            def place(
                stage: int, owner: int, pieces: list[Tensor], plan: ExchangePlan = plan, buffer: Tensor = buffer
            ) -> None:
                for piece, part in zip(plan.receives.get(owner, ()), pieces, strict=True):
                    buffer[_at_receiver(piece)].copy_(part)

            jobs.append(_Job(rows, buffer, self.transport.exchange(slot, taken, place)))
        return jobs

    def _rows(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        """The plan for this batch: made at its first layer, kept for the others."""
        shape = (q.shape[0], q.shape[1])
        if self._shape != shape or self._planned_for is not documents:
            self._planned, self._shape, self._planned_for = self._plan(q, documents), shape, documents
        return self._planned

    def _plan(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        size, batch = self.size, q.shape[0]
        length = q.shape[1] * size
        if documents is None:
            plan = exchange_plan(length, size, self.rank, self.window)
            return [_Rows(slice(0, batch), plan, self._calls(plan, q.device))]
        rows = []
        for row in range(batch):
            first = row * length
            inside = [bound - first for bound in documents.boundaries if first <= bound <= first + length]
            assert inside[0] == 0 and inside[-1] == length, "documents must not cross rows of the batch"
            plan = exchange_plan(length, size, self.rank, self.window, inside)
            rows.append(_Rows(slice(row, row + 1), plan, self._calls(plan, q.device)))
        return rows

    def _calls(self, plan: ExchangePlan, device: torch.device) -> list[_Call]:
        calls = []
        for call in plan.calls:
            queries, keys = slice(call.q_start, call.q_stop), slice(call.k_start, call.k_stop)
            if call.query_bounds is None or call.key_bounds is None:
                offset = (call.k_stop - call.k_start) - (call.q_stop - call.q_start)
                mask = AttentionMask(causal=True, window=self.window, offset=offset)
            else:
                mask = AttentionMask(
                    causal=True,
                    window=self.window,
                    documents=Documents.from_boundaries(call.query_bounds, device),
                    key_documents=Documents.from_boundaries(call.key_bounds, device),
                )
            calls.append(_Call(queries, keys, mask, call.remote))
        return calls


class _KeyGradients:
    """dK and dV of one buffer: this rank's share for the fetched keys, and all ranks' shares for its own."""

    def __init__(self, transport: Transport, plan: ExchangePlan, buffer: Tensor):
        self.transport, self.plan = transport, plan
        self.slot = transport.slot((1, plan.largest_buffer, *buffer.shape[1:]), buffer)
        self.gradient = self.slot[0]
        self.precise = torch.promote_types(buffer.dtype, torch.float32)
        self.written: slice | None = None
        """The first call's keys: their gradients are in place. There are two calls at most, one for each chunk."""
        self.extra: list[tuple[slice, Tensor]] = []
        """Second shares of keys that two query chunks see: (keys, [keys, 2, B, K, D])."""
        self.incoming: dict[int, list[tuple[slice, Tensor]]] = {
            peer: [(keys, torch.empty_like(self.gradient[keys])) for keys in map(_at_owner, pieces)]
            for peer, pieces in plan.sends.items()
        }
        """Peers' shares of own keys, and where in the buffer these are."""
        self.arrival: Arrival | None = None

    def add(self, keys: slice, backward: Callable[[Tensor, Tensor], object]) -> None:
        """Runs `backward(dk, dv)`, which fills the gradients of one call's keys, and keeps them."""
        if not self.written or keys.start >= self.written.stop or keys.stop <= self.written.start:
            backward(*_keys_and_values(self.gradient, keys))
            self.written = self.written or keys
            return
        part = torch.empty_like(self.gradient[keys])
        backward(*_keys_and_values(part, slice(None)))
        low, high = max(keys.start, self.written.start), min(keys.stop, self.written.stop)
        self.extra.append((slice(low, high), part[low - keys.start : high - keys.start]))
        self.gradient[keys.start : low].copy_(part[: low - keys.start])
        self.gradient[high : keys.stop].copy_(part[high - keys.start :])

    def send_home(self) -> None:
        """Starts sending the shares of fetched keys to their owners and receiving those of own keys; once."""
        if self.arrival is not None:
            return
        for pieces in self.plan.receives.values():
            for keys in map(_at_receiver, pieces):
                shares = _overlaps(keys, self.extra)
                if shares:  # rounded once more, on the wire
                    total = self.gradient[keys].to(self.precise)
                    for where, share in shares:
                        total[where] += share
                    self.gradient[keys].copy_(total)

        def taken(owner: int, reader: int) -> list[slice]:
            mine = reader == self.transport.rank
            pieces = self.plan.sends.get(owner, ()) if mine else self.plan.receives.get(reader, ())
            return list(map(_at_receiver, pieces))

        def place(stage: int, owner: int, pieces: list[Tensor]) -> None:
            for (_, share), part in zip(self.incoming.get(owner, ()), pieces, strict=True):
                share.copy_(part)

        self.arrival = self.transport.exchange(self.slot, taken, place)

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Waits for the peers' shares and adds up, in fp32, dK and dV of this rank's own tokens [B, L, K, D]."""
        assert self.arrival is not None
        self.arrival.wait()
        incoming = [share for of_peer in self.incoming.values() for share in of_peer]
        for local, index, length in self.plan.own:
            keys, tokens = slice(index, index + length), slice(local, local + length)
            shares = _overlaps(keys, self.extra) + _overlaps(keys, incoming)
            mine = self.gradient[keys]
            precise = (
                mine.to(self.precise) if len(shares) > 1 or any(len(share) < length for _, share in shares) else None
            )
            for which, target in enumerate((dk[:, tokens].transpose(0, 1), dv[:, tokens].transpose(0, 1))):
                if precise is not None:
                    for where, share in shares:
                        precise[where, which] += share[:, which]
                    target.copy_(precise[:, which])
                elif shares:
                    torch.add(mine[:, which], shares[0][1][:, which], out=target)  # adds in fp32, rounds once
                else:
                    target.copy_(mine[:, which])


def _overlaps(keys: slice, shares: list[tuple[slice, Tensor]]) -> list[tuple[slice, Tensor]]:
    """The parts of `shares` that fall on `keys`, each with its place relative to keys.start."""
    found = []
    for where, share in shares:
        start, stop = max(keys.start, where.start), min(keys.stop, where.stop)
        if start < stop:
            found.append(
                (slice(start - keys.start, stop - keys.start), share[start - where.start : stop - where.start])
            )
    return found


def _at_owner(piece: Piece) -> slice:
    """Its keys in the owner's buffer."""
    return slice(piece.owner_index, piece.owner_index + piece.length)


def _at_receiver(piece: Piece) -> slice:
    """Its keys in the receiver's buffer."""
    return slice(piece.receiver_index, piece.receiver_index + piece.length)


def _keys_and_values(buffer: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
    """k and v [B, keys, K, D], views of the buffer [M, 2, B, K, D]."""
    return buffer[keys, 0].transpose(0, 1), buffer[keys, 1].transpose(0, 1)
