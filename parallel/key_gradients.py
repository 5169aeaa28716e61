"""dK and dV of an exchange: each rank sends its contribution for every key it saw to the key's owner, which adds them
up in fp32.

Shapes: B batch, L local tokens, K key/value heads, D head_dim, M buffer length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from parallel.exchange_plan import ExchangePlan
from parallel.fused import Share, add_shares
from parallel.transport import Arrival, Transport


def sides(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [B, M, K, D] of a buffer [M, 2, B, K, D]: views."""
    keys, values = buffer.permute(1, 2, 0, 3, 4).unbind()
    return keys, values


class KeyGradients:
    """This rank's share for the keys of one buffer, and all ranks' shares for its own."""

    def __init__(self, transport: Transport, plan: ExchangePlan, buffer: Tensor):
        self.transport, self.plan = transport, plan
        landing = buffer.new_empty((plan.sent_tokens, *buffer.shape[1:]))  # before the slot: peers may be done first
        self.incoming: list[Share] = []
        """Peers' shares of own keys, by their place in the buffer."""
        self.places: dict[int, list[Tensor]] = {}
        """The same, by peer."""
        start = 0
        for peer, pieces in plan.sends.items():
            self.places[peer] = []
            for piece in pieces:
                self.places[peer].append(landing[start : start + piece.length])
                self.incoming.append((piece.at_owner, self.places[peer][-1]))
                start += piece.length
        self.slot = transport.slot((plan.largest_buffer, *buffer.shape[1:]), buffer)
        self.written: slice | None = None
        """The first call's keys: their gradients are in place. There are two calls at most, one for each chunk."""
        self.extra: list[Share] = []
        """Second shares of keys that two query chunks see."""
        if plan.twice is not None:
            first, second = plan.twice
            self.extra.append((first, self.slot[second]))
        self.arrival: Arrival | None = None

    @contextmanager
    def of(self, keys: slice | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The place for one call's dk and dv [B, keys, K, D]; the whole buffer for None."""
        keys = keys or slice(0, self.plan.buffer_length)
        if self.written is None or keys.start >= self.written.stop or keys.stop <= self.written.start:
            yield sides(self.slot[keys])
            self.written = self.written or keys
            return
        part = self.slot.new_empty((keys.stop - keys.start, *self.slot.shape[1:]))
        yield sides(part)
        low, high = max(keys.start, self.written.start), min(keys.stop, self.written.stop)
        self.extra.append((slice(low, high), part[low - keys.start : high - keys.start]))
        for alone in (slice(keys.start, low), slice(high, keys.stop)):
            if alone.start < alone.stop:
                self.slot[alone].copy_(part[alone.start - keys.start : alone.stop - keys.start])

    def send_home(self) -> None:
        """Starts sending the shares of fetched keys to their owners and receiving those of own keys; once."""
        if self.arrival is not None:
            return
        for piece in (piece for pieces in self.plan.receives.values() for piece in pieces):
            shares = _overlaps(piece.at_receiver, self.extra)
            if shares:  # rounded once more, on the wire
                mine = self.slot[piece.at_receiver]
                add_shares(*sides(mine), [(slice(0, piece.length), mine), *shares])

        def taken(owner: int, reader: int) -> list[slice]:
            mine = reader == self.transport.rank
            pieces = self.plan.sends.get(owner, ()) if mine else self.plan.receives.get(reader, ())
            return [piece.at_receiver for piece in pieces]

        def place(owner: int, parts: list[Tensor]) -> None:
            for target, part in zip(self.places.get(owner, ()), parts, strict=True):
                target.copy_(part)

        self.arrival = self.transport.exchange(self.slot, taken, place)

    def collect(self, dk: Tensor, dv: Tensor) -> None:
        """Waits for the peers' shares and adds up dK and dV of this rank's own tokens [B, L, K, D]."""
        assert self.arrival is not None
        self.arrival.wait()
        everything = [(slice(0, len(self.slot)), self.slot), *self.extra, *self.incoming]
        own = ((slice(index, index + length), local) for local, index, length in self.plan.own)
        add_shares(dk, dv, [share for keys, local in own for share in _overlaps(keys, everything, local)])


def _overlaps(keys: slice, shares: list[Share], place: int = 0) -> list[Share]:
    """The parts of `shares` that fall on `keys`, each with its place where keys.start is at `place`."""
    found = []
    for where, share in shares:
        start, stop = max(keys.start, where.start), min(keys.stop, where.stop)
        if start < stop:
            whole, inside = stop - start == len(share), slice(start - where.start, stop - where.start)
            moved = place - keys.start
            found.append((slice(start + moved, stop + moved), share if whole else share[inside]))
    return found
