"""Context-parallel attention by exchange: each rank fetches the keys its queries see, then attends once
(`exchange_plan`).

Shapes: B batch, L = S / P local tokens, H query heads, K key/value heads, D head_dim, M buffer length, G head groups.

Keys and values of one group of heads lie interleaved in one buffer [M, 2, B, K / G, D], so that a piece of both is one
contiguous message. While the kernel works on one group of heads, the keys of the next are on their way; in the backward
pass gradients travel back to the owners of the keys in the same manner. The kernel sees all keys of a query at once:
its output, LSE and dQ are final. An owner adds up dK and dV in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from model.kernels import AttentionKernel, AttentionMask, Documents
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


class ExchangeAttention:
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
        self.group, self.kernel, self.scale = group, kernel, scale
        self.window, self.deterministic, self.head_groups = window, deterministic, head_groups
        self.keep_gathered = keep_gathered
        self.rank = dist.get_rank(group)
        self._shape: tuple[int, int] = (0, 0)
        self._documents: Documents | None = None
        self._planned: list[_Rows] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        return _Exchange.apply(q, k, v, self, self._rows(q, documents))

    def _rows(self, q: Tensor, documents: Documents | None) -> list[_Rows]:
        """The plan for this batch: made at its first layer, kept for the others."""
        shape = (q.shape[0], q.shape[1])
        if self._shape != shape or self._documents is not documents:
            self._planned, self._shape, self._documents = self._plan(q, documents), shape, documents
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


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: ExchangeAttention, planned: list[_Rows]
    ) -> Tensor:
        groups = attention.head_groups
        out = torch.empty_like(q)
        jobs = _gather_all(attention, planned, k, v)
        lses = [[q.new_empty(0)] * len(rows.calls) for rows, *_ in jobs]
        # First what needs no peer, then each group of heads as its keys arrive.
        for remote in (False, True):
            for number, (rows, group, buffer, works) in enumerate(jobs):
                heads = _heads(q.shape[2], group, groups)
                if remote:
                    for work in works:
                        work.wait()
                for index, call in enumerate(rows.calls):
                    if call.remote == remote:
                        _, lses[number][index] = attention.kernel.forward(
                            q[rows.rows, call.queries, heads],
                            *_keys_and_values(buffer, call.keys),
                            attention.scale,
                            call.mask,
                            out=out[rows.rows, call.queries, heads],
                        )
        keys_and_values = [buffer for _, _, buffer, _ in jobs] if attention.keep_gathered else [k, v]
        ctx.save_for_backward(q, out, *(lse for of_job in lses for lse in of_job), *keys_and_values)
        ctx.attention, ctx.planned = attention, planned
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        attention, planned, groups = ctx.attention, ctx.planned, ctx.attention.head_groups
        q, out, *saved = ctx.saved_tensors
        count = sum(len(rows.calls) for rows in planned) * groups
        lses, keys_and_values = iter(saved[:count]), saved[count:]
        if attention.keep_gathered:
            places = [(rows, group) for rows in planned for group in range(groups)]
            jobs = [_Job(*place, buffer, []) for place, buffer in zip(places, keys_and_values, strict=True)]
        else:
            jobs = _gather_all(attention, planned, *keys_and_values)
        dout, dq = grads[0], torch.empty_like(q)
        shares = []
        for rows, group, buffer, works in jobs:
            for work in works:
                work.wait()
            heads = _heads(q.shape[2], group, groups)
            share = _KeyGradients(attention, rows, buffer)
            for call in rows.calls:
                if not call.remote:
                    share.send_home()  # what peers wait for is complete; the rest is computed meanwhile
                inside = rows.rows, call.queries, heads
                share.add(
                    call.keys,
                    lambda dk, dv, call=call, inside=inside, buffer=buffer: attention.kernel.backward(
                        dout[inside],
                        q[inside],
                        *_keys_and_values(buffer, call.keys),
                        out[inside],
                        next(lses),
                        attention.scale,
                        call.mask,
                        attention.deterministic,
                        dq=dq[inside],
                        dk=dk,
                        dv=dv,
                    ),
                )
            share.send_home()
            shares.append((rows, group, share))
        if len(shares) == 1:
            dk, dv = _keys_and_values(shares[0][2].collect(), slice(None))
            return dq, dk, dv, None, None
        shape = (q.shape[0], q.shape[1], jobs[0].buffer.shape[3] * groups, q.shape[3])
        dk, dv = q.new_empty(shape), q.new_empty(shape)
        for rows, group, share in shares:
            heads = _heads(shape[2], group, groups)
            for whole, part in zip((dk, dv), _keys_and_values(share.collect(), slice(None)), strict=True):
                whole[rows.rows, :, heads] = part
        return dq, dk, dv, None, None


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

    def collect(self) -> Tensor:
        """Waits for the peers' shares; dK and dV of this rank's own tokens [L, 2, B, K / G, D], added up in fp32."""
        for work in self.works or []:
            work.wait()
        if len(self.plan.own) == 1:  # the last rank's chunks are neighbours, in its buffer too
            ((_, index, length),) = self.plan.own
            return self._sum(slice(index, index + length), None)
        total = self.gradient.new_empty(sum(length for *_, length in self.plan.own), *self.gradient.shape[1:])
        for local, index, length in self.plan.own:
            self._sum(slice(index, index + length), total[local : local + length])
        return total

    def _sum(self, keys: slice, target: Tensor | None) -> Tensor:
        """All shares of some own keys, rounded once; written to `target`, or in place without one."""
        mine = self.gradient[keys]
        target = mine if target is None else target
        shares = _overlaps(keys, self.extra) + _overlaps(keys, self.incoming)
        if len(shares) == 1 and len(shares[0][1]) == len(mine):
            return torch.add(mine, shares[0][1], out=target)  # adds in fp32
        if not shares:
            return mine if target is mine else target.copy_(mine)
        precise = mine.to(self.precise)
        for where, share in shares:
            precise[where] += share
        return target.copy_(precise)


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


def _gather_all(attention: ExchangeAttention, planned: list[_Rows], k: Tensor, v: Tensor) -> list[_Job]:
    """Packs every group of heads and starts all transfers, in the order in which they will be needed."""
    jobs = []
    for rows in planned:
        for group in range(attention.head_groups):
            buffer = _packed(rows, k, v, group, attention.head_groups)
            jobs.append(_Job(rows, group, buffer, _gather(attention, rows.plan, buffer)))
    return jobs


def _heads(count: int, group: int, groups: int) -> slice:
    return slice(count * group // groups, count * (group + 1) // groups)


def _keys_and_values(buffer: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
    """k and v [B, keys, K / G, D], views of the buffer [M, 2, B, K / G, D]."""
    return buffer[keys, 0].transpose(0, 1), buffer[keys, 1].transpose(0, 1)


def _packed(rows: _Rows, k: Tensor, v: Tensor, group: int, groups: int) -> Tensor:
    """A buffer that holds this rank's own keys and values of one group of heads at their places."""
    heads = _heads(k.shape[2], group, groups)
    k, v = k[rows.rows, :, heads], v[rows.rows, :, heads]
    buffer = k.new_empty(rows.plan.buffer_length, 2, k.shape[0], k.shape[2], k.shape[3])
    for local, index, length in rows.plan.own:
        own = [part[:, local : local + length].transpose(0, 1) for part in (k, v)]
        torch.stack(own, dim=1, out=buffer[index : index + length])
    return buffer


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
