"""Who needs which keys: the plan of an exchange. Pure Python, the same on every rank: no tensor, no process group.

P context_parallel_size, S sequence_length. Each rank holds one range of positions or two, its chunks: in the zigzag
order, or so that documents balance (see `parallel.sequence`). A query chunk [a, b) sees one contiguous range of keys,
[low, b): causality ends it at b, and it begins where the window of the first query or the first query's document
begins. So each rank gathers at most two ranges of keys (one, where they overlap) into a buffer, in the order of their
positions, and every query chunk is one kernel call: no partial results to merge, no document padded, and what nobody
sees does not travel. Where documents keep the two chunks' keys apart, one call does for both: to a kernel they are
documents among others.

Positions are those of the full sequence. "Local" indices count within a rank's part, "buffer" indices within its
buffer.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.sequence import Part, balanced_parts, zigzag_parts


@dataclass(frozen=True)
class Piece:
    """Keys [start, start + length) of the sequence, and where they begin in the receiver's buffer, in the owner's
    buffer and among the owner's local tokens."""

    start: int
    length: int
    receiver_index: int
    owner_index: int
    owner_local: int

    @property
    def at_owner(self) -> slice:
        """In the owner's buffer."""
        return slice(self.owner_index, self.owner_index + self.length)

    @property
    def at_receiver(self) -> slice:
        """In the receiver's buffer."""
        return slice(self.receiver_index, self.receiver_index + self.length)


@dataclass(frozen=True)
class ExchangeCall:
    """Local queries [q_start, q_stop) against buffered keys [k_start, k_stop), causal, aligned at their ends."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    query_bounds: tuple[int, ...] | None
    """Documents among the queries, from 0 to their number; None without documents."""
    key_bounds: tuple[int, ...] | None
    """The same documents among the keys: only the first may have more keys than queries."""
    remote: bool
    """Some of the keys come from other ranks."""


@dataclass(frozen=True)
class ExchangePlan:
    """What one rank does: fill its buffer, send to and receive from its peers, call the kernel."""

    buffer_length: int
    largest_buffer: int
    """The largest buffer_length of all ranks."""
    own: tuple[tuple[int, int, int], ...]
    """(local index, buffer index, length) of this rank's own chunks."""
    receives: dict[int, tuple[Piece, ...]]
    """By peer. In the backward pass gradients of the same pieces travel the other way."""
    sends: dict[int, tuple[Piece, ...]]
    calls: tuple[ExchangeCall, ...]
    """Those with remote keys first, and of these the one with more: its gradients have the longest way to go."""

    @property
    def received_tokens(self) -> int:
        """Keys that travel to this rank in a forward pass."""
        return sum(piece.length for pieces in self.receives.values() for piece in pieces)

    @property
    def sent_tokens(self) -> int:
        """Keys of this rank that travel to others, each as often as it does."""
        return sum(piece.length for pieces in self.sends.values() for piece in pieces)


def exchange_plan(
    sequence_length: int,
    context_parallel_size: int,
    cp_rank: int,
    window: int | None = None,
    boundaries: Sequence[int] | None = None,
    balanced: bool = False,
) -> ExchangePlan:
    """`boundaries` are one row's documents, 0 = b0 < b1 < ... < S, in positions of the full sequence; `balanced` if the
    sequence was cut by them."""
    if balanced and boundaries is not None:
        parts = balanced_parts(sequence_length, context_parallel_size, boundaries, window)
    else:
        parts = zigzag_parts(sequence_length, context_parallel_size)
    layouts = [_Layout(part, window, boundaries) for part in parts]
    mine = layouts[cp_rank]
    return ExchangePlan(
        buffer_length=mine.buffer_length,
        largest_buffer=max(layout.buffer_length for layout in layouts),
        own=tuple((local, mine.buffer_index(start), length) for local, start, length in mine.own),
        receives={peer: pieces for peer, other in enumerate(layouts) if (pieces := _pieces(mine, other))},
        sends={peer: pieces for peer, other in enumerate(layouts) if (pieces := _pieces(other, mine))},
        calls=tuple(sorted(_joined(mine.calls()), key=lambda call: (not call.remote, call.k_start - call.k_stop))),
    )


def _joined(calls: list[ExchangeCall]) -> list[ExchangeCall]:
    """One call for both chunks if they have documents and share no key."""
    if len(calls) < 2:
        return calls
    one, two = calls
    if one.query_bounds is None or one.key_bounds is None or two.query_bounds is None or two.key_bounds is None:
        return calls
    if one.k_stop != two.k_start:
        return calls
    queries, keys = one.query_bounds[-1], one.key_bounds[-1]
    return [
        ExchangeCall(
            one.q_start,
            two.q_stop,
            one.k_start,
            two.k_stop,
            one.query_bounds + tuple(queries + bound for bound in two.query_bounds[1:]),
            one.key_bounds + tuple(keys + bound for bound in two.key_bounds[1:]),
            remote=one.remote or two.remote,
        )
    ]


def _pieces(receiver: _Layout, owner: _Layout) -> tuple[Piece, ...]:
    """What `receiver` needs of `owner`'s chunks, in the order of positions; nothing between a rank and itself."""
    if receiver is owner:
        return ()
    found = []
    for low, high in receiver.segments:
        for local, start, length in owner.own:
            first, last = max(low, start), min(high, start + length)
            if first < last:
                places = receiver.buffer_index(first), owner.buffer_index(first), local + first - start
                found.append(Piece(first, last - first, *places))
    return tuple(sorted(found, key=lambda piece: piece.start))


class _Layout:
    """One rank's queries, the keys they need, and where these lie in its buffer."""

    def __init__(self, part: Part, window: int | None, boundaries: Sequence[int] | None):
        self.window, self.boundaries = window, boundaries
        self.own: list[tuple[int, int, int]] = []
        """Local index, position and length of each chunk."""
        local = 0
        for start, stop in part:
            self.own.append((local, start, stop - start))
            local += stop - start
        self.segments: list[tuple[int, int]] = []
        for _, start, length in self.own:
            low = self._lowest_key(start)
            if self.segments and low <= self.segments[-1][1]:
                low = min(low, self.segments.pop()[0])
            self.segments.append((low, start + length))

    @property
    def buffer_length(self) -> int:
        return sum(high - low for low, high in self.segments)

    def buffer_index(self, position: int) -> int:
        index = 0
        for low, high in self.segments:
            if low <= position < high:
                return index + position - low
            index += high - low
        raise AssertionError(f"position {position} is not in the buffer")

    def calls(self) -> list[ExchangeCall]:
        calls = []
        for local, start, length in self.own:
            low, stop = self._lowest_key(start), start + length
            query_bounds = key_bounds = None
            if self.boundaries is not None:
                inside = self.boundaries[bisect.bisect_right(self.boundaries, start) :]
                inner = [bound for bound in inside if bound < stop]
                query_bounds = (0, *(bound - start for bound in inner), length)
                key_bounds = (0, *(bound - low for bound in inner), stop - low)
            k_start = self.buffer_index(low)
            calls.append(
                ExchangeCall(
                    q_start=local,
                    q_stop=local + length,
                    k_start=k_start,
                    k_stop=k_start + stop - low,
                    query_bounds=query_bounds,
                    key_bounds=key_bounds,
                    remote=not self._owns(low, start),
                )
            )
        return calls

    def _lowest_key(self, query: int) -> int:
        """First key that the query at this position sees."""
        low = 0
        if self.boundaries is not None:
            low = self.boundaries[bisect.bisect_right(self.boundaries, query) - 1]
        if self.window is not None:
            low = max(low, query - self.window + 1)
        return low

    def _owns(self, low: int, high: int) -> bool:
        """Whether all of [low, high) is this rank's own."""
        covered = sum(max(0, min(high, start + length) - max(low, start)) for _, start, length in self.own)
        return covered == high - low
