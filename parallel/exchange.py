"""Context-parallel attention by exchange: each rank fetches the keys its queries see, then attends once
(`exchange_plan`).

Shapes: B batch, L = S / P local tokens, H query heads, K key/value heads, D head_dim, M buffer length, G head groups.

Keys and values of one group of heads lie interleaved in one buffer [M, 2, B, K / G, D], so that a piece of both is one
contiguous message. While the kernel works on one group of heads, the keys of the next are on their way; in the backward
pass gradients travel back to the owners of the keys in the same manner. The kernel sees all keys of a query at once:
its output, LSE and dQ are final. An owner adds up dK and dV in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels import AttentionKernel, AttentionMask, AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS
from model.kernels.protocol import Gradients, Targets
from parallel.exchange_plan import ExchangePlan, exchange_plan


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
    """One group of heads of some rows, on its way."""

    rows: _Rows
    group: int
    buffer: Tensor
    """[M, 2, B, K / G, D], complete once `works` are done."""
    works: list[dist.Work]


class ExchangeAttention(AttentionOperator):
    """Causal self-attention of sequences whose tokens are spread over `group` (zigzag, see `parallel.sequence`).

    Called with this rank's q [B, L, H, D], k and v [B, L, K, D] and the documents of the full sequences; returns this
    rank's outputs [B, L, H, D]. `head_groups` must divide K. `keep_gathered` keeps fetched keys and values for the
    backward pass; otherwise they are fetched again.
    """

    def __init__(
        self,
        group: ProcessGroup,
        kernel: AttentionKernel,
        *,
        scale: float,
        window: int | None = None,
        deterministic: bool = False,
        head_groups: int = 1,
        keep_gathered: bool = True,
    ):
        super().__init__()
        self.group, self.kernel, self.scale = group, kernel, scale
        self.window, self.deterministic, self.head_groups = window, deterministic, head_groups
        self.keep_gathered = keep_gathered
        self.rank = dist.get_rank(group)
        self._shape: tuple[int, int] = (0, 0)
        self._planned_for: Documents | None = None
        self._planned: list[_Rows] = []

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`kept` has room for the keys and values of whole sequences: documents decide how much of it is used."""
        kept = 2 * k.numel() * self.group.size() if self.keep_gathered else 0
        return (q.shape[0], q.shape[2], q.shape[1]), (kept,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty(q.shape) if out is None else out
        lse_shape, kept_shape = self.saved_shapes(q, k)
        lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
        kept = k.new_empty(kept_shape)
        jobs = _gather_all(self, self._rows(q, documents), k, v, kept)
        # First what needs no peer, then each group of heads as its keys arrive.
        for remote in (False, True):
            for rows, group, buffer, works in jobs:
                heads = _heads(q.shape[2], group, self.head_groups)
                if remote:
                    for work in works:
                        work.wait()
                for call in rows.calls:
                    if call.remote == remote:
                        inside = rows.rows, call.queries, heads
                        _, part = self.kernel.forward(
                            q[inside], *_keys_and_values(buffer, call.keys), self.scale, call.mask, out=out[inside]
                        )
                        lse[rows.rows, heads, call.queries] = part
        return out, lse, kept

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        kept: Tensor,
        documents: Documents | None,
        targets: Targets = NO_TARGETS,
    ) -> Gradients:
        planned = self._rows(q, documents)
        if self.keep_gathered:
            jobs = [_Job(rows, group, buffer, []) for rows, group, buffer in _buffers(self, planned, k, kept)]
        else:
            jobs = _gather_all(self, planned, k, v, kept)
        dq = q.new_empty(q.shape) if targets[0] is None else targets[0]
        shares = []
        for rows, group, buffer, works in jobs:
            for work in works:
                work.wait()
            heads = _heads(q.shape[2], group, self.head_groups)
            share = _KeyGradients(self, rows, buffer)
            for call in rows.calls:
                if not call.remote:
                    share.send_home()  # what peers wait for is complete; the rest is computed meanwhile
                inside = rows.rows, call.queries, heads
                share.add(
                    call.keys,
                    lambda dk, dv, call=call, inside=inside, buffer=buffer: self.kernel.backward(
                        dout[inside],
                        q[inside],
                        *_keys_and_values(buffer, call.keys),
                        out[inside],
                        lse[inside[0], inside[2], inside[1]],
                        self.scale,
                        call.mask,
                        self.deterministic,
                        dq=dq[inside],
                        dk=dk,
                        dv=dv,
                    ),
                )
            share.send_home()
            shares.append((rows, group, share))
        dk = k.new_empty(k.shape) if targets[1] is None else targets[1]
        dv = v.new_empty(v.shape) if targets[2] is None else targets[2]
        for rows, group, share in shares:
            own = rows.rows, slice(None), _heads(k.shape[2], group, self.head_groups)
            share.collect(dk[own], dv[own])
        return dq, dk, dv

    def _rows(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        """The plan for this batch: made at its first layer, kept for the others."""
        shape = (q.shape[0], q.shape[1])
        if self._shape != shape or self._planned_for is not documents:
            self._planned, self._shape, self._planned_for = self._plan(q, documents), shape, documents
        return self._planned

    def _plan(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        size, batch = self.group.size(), q.shape[0]
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

    def __init__(self, attention: ExchangeAttention, rows: _Rows, buffer: Tensor):
        self.group, self.plan = attention.group, rows.plan
        self.gradient = torch.empty_like(buffer)
        self.precise = torch.promote_types(buffer.dtype, torch.float32)
        self.written: slice | None = None
        """The first call's keys: their gradients are in place. There are two calls at most, one for each chunk."""
        self.extra: list[tuple[slice, Tensor]] = []
        """Second shares of keys that two query chunks see: (keys, [keys, 2, B, K / G, D])."""
        self.incoming: list[tuple[slice, Tensor]] = []
        """Peers' shares of own keys, and where in the buffer these are."""
        self.works: list[dist.Work] | None = None

    def add(self, keys: slice, backward: Any) -> None:
        """Runs `backward(dk, dv)`, which fills the gradients of one call's keys, and keeps them."""
        if not self.written or keys.start >= self.written.stop or keys.stop <= self.written.start:
            backward(*_keys_and_values(self.gradient[keys], slice(None)))
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
        if self.works is not None:
            return
        operations = []
        for peer, pieces in self.plan.receives.items():
            for piece in pieces:
                keys = slice(piece.receiver_index, piece.receiver_index + piece.length)
                part = self.gradient[keys]
                shares = _overlaps(keys, self.extra)
                if shares:  # rounded once more, on the wire
                    total = part.to(self.precise)
                    for where, share in shares:
                        total[where] += share
                    part.copy_(total)
                operations.append(_operation(dist.isend, part, peer, self.group))
        for peer, pieces in self.plan.sends.items():
            for piece in pieces:
                keys = slice(piece.owner_index, piece.owner_index + piece.length)
                part = torch.empty_like(self.gradient[keys])
                self.incoming.append((keys, part))
                operations.append(_operation(dist.irecv, part, peer, self.group))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Waits for the peers' shares and adds up, in fp32, dK and dV of this rank's own tokens [B, L, K / G, D]."""
        for work in self.works or []:
            work.wait()
        for local, index, length in self.plan.own:
            keys, tokens = slice(index, index + length), slice(local, local + length)
            shares = _overlaps(keys, self.extra) + _overlaps(keys, self.incoming)
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


def _buffers(
    attention: ExchangeAttention, planned: list[_Rows], k: Tensor, kept: Tensor
) -> list[tuple[_Rows, int, Tensor]]:
    """A buffer for every group of heads, in the order in which they are needed: parts of `kept` if that has room."""
    found, used = [], 0
    heads = k.shape[2] // attention.head_groups
    for rows in planned:
        batch = len(range(*rows.rows.indices(k.shape[0])))
        shape = (rows.plan.buffer_length, 2, batch, heads, k.shape[3])
        for group in range(attention.head_groups):
            memory = kept[used : used + math.prod(shape)] if attention.keep_gathered else k.new_empty(math.prod(shape))
            found.append((rows, group, memory.view(shape)))
            used += math.prod(shape)
    return found


def _gather_all(attention: ExchangeAttention, planned: list[_Rows], k: Tensor, v: Tensor, kept: Tensor) -> list[_Job]:
    """Packs every group of heads and starts all transfers, in the order in which they will be needed."""
    jobs = []
    for rows, group, buffer in _buffers(attention, planned, k, kept):
        _pack(buffer, rows, k, v, group, attention.head_groups)
        jobs.append(_Job(rows, group, buffer, _gather(attention, rows.plan, buffer)))
    return jobs


def _heads(count: int, group: int, groups: int) -> slice:
    return slice(count * group // groups, count * (group + 1) // groups)


def _keys_and_values(buffer: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
    """k and v [B, keys, K / G, D], views of the buffer [M, 2, B, K / G, D]."""
    return buffer[keys, 0].transpose(0, 1), buffer[keys, 1].transpose(0, 1)


def _pack(buffer: Tensor, rows: _Rows, k: Tensor, v: Tensor, group: int, groups: int) -> None:
    """Puts this rank's own keys and values of one group of heads at their places."""
    heads = _heads(k.shape[2], group, groups)
    k, v = k[rows.rows, :, heads], v[rows.rows, :, heads]
    for local, index, length in rows.plan.own:
        own = [part[:, local : local + length].transpose(0, 1) for part in (k, v)]
        torch.stack(own, dim=1, out=buffer[index : index + length])


def _gather(attention: ExchangeAttention, plan: ExchangePlan, buffer: Tensor) -> list[dist.Work]:
    """Starts fetching the keys that peers hold, straight to their places in the buffer, and serving theirs."""
    operations = []
    for peer, pieces in plan.sends.items():
        for piece in pieces:
            part = buffer[piece.owner_index : piece.owner_index + piece.length]
            operations.append(_operation(dist.isend, part, peer, attention.group))
    for peer, pieces in plan.receives.items():
        for piece in pieces:
            part = buffer[piece.receiver_index : piece.receiver_index + piece.length]
            operations.append(_operation(dist.irecv, part, peer, attention.group))
    return dist.batch_isend_irecv(operations) if operations else []


def _operation(direction: Any, part: Tensor, peer: int, group: ProcessGroup) -> dist.P2POp:
    return dist.P2POp(direction, part, dist.get_global_rank(group, peer), group)
