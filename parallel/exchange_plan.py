"""The plan of an exchange: which keys travel between which ranks, and what the kernel is then called with. Pure Python,
the same on every rank: no tensor, no process group.

P context_parallel_size, S sequence_length. Each rank holds one or two ranges of positions, its chunks: in the zigzag
order, or cut so that documents balance (see `parallel.sequence`). The queries of a chunk see one contiguous range of
keys (see `parallel.key_layout`), so each rank gathers at most two ranges into a buffer. It merges no partial results,
pads no document, and fetches nothing that its queries do not see.

Every query chunk is one kernel call, over a part of a buffer in which overlapping ranges lie as one. Alternatively one
call serves both chunks: to a kernel they are two documents, as long as their keys lie one after the other. So if ranges
overlap and calls are `joined`, keys that both chunks see lie in the buffer twice. They are fetched once and copied,
because a message costs more than a copy, and their gradients are added up before they travel.

Positions are those of the full sequence. "Local" indices count within a rank's part, "buffer" indices within its
buffer.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel.key_layout import KeyLayout, buffer_room
from parallel.sequence import Part, zigzag_parts

_JOINED_UP_TO = 65536
"""Query heads x tokens of a chunk up to which one call for both chunks does not lose against two. What rank 0 of 2
reached of the ideal by one and by two, forward + backward by flash_attn_4 on an H200, exchange not counted: 32/8 heads
and chunks of 1,024 tokens 86 and 71 %, of 2,048 91.2 and 90.2, of 4,096 93.0 and 94.0, of 8,192 95.5 and 97.2. Kernels
of variable lengths are a little slower, but the host issues one call in half of the time, and it sets the pace of short
ones (benchmarks/attention_parts.py)."""
_JOINED_TOKENS = 4096
"""Longer chunks keep calls of their own however few the heads: the call on a rank's own keys then hides how those of
others arrive, which with 8/2 heads and chunks of 8,192 tokens is worth more (94.7 % of the ideal on two H200s) than the
faster kernels of one call (92.3 %)."""


def one_call_is_faster(query_heads: int, local_tokens: int) -> bool:
    """Whether one joined call is faster, for a kernel that takes variable lengths."""
    chunk = local_tokens // 2
    return chunk <= _JOINED_TOKENS and query_heads * chunk <= _JOINED_UP_TO


@dataclass(frozen=True)
class Piece:
    """Keys [start, start + length) of the sequence, and where they begin in the receiver's buffer, in the owner's
    buffer and among the owner's local tokens."""

    start: int
    length: int
    receiver_index: int
    owner_index: int
    owner_local: int

    @cached_property
    def at_owner(self) -> slice:
        """In the owner's buffer."""
        return slice(self.owner_index, self.owner_index + self.length)

    @cached_property
    def at_receiver(self) -> slice:
        """In the receiver's buffer."""
        return slice(self.receiver_index, self.receiver_index + self.length)

    @cached_property
    def local(self) -> slice:
        """Among the owner's local tokens."""
        return slice(self.owner_local, self.owner_local + self.length)


@dataclass(frozen=True)
class ExchangeCall:
    """Local queries [q_start, q_stop) against buffered keys [k_start, k_stop), causal, aligned at their ends."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    query_bounds: tuple[int, ...] | None
    """Documents among the queries, from 0 to their number; None if all are one. Those of a second chunk follow."""
    key_bounds: tuple[int, ...] | None
    """The same documents among the keys: only a chunk's first may have more keys than queries."""
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
    own_again: tuple[int, int, int] | None
    """The same of own keys that lie twice: their second place."""
    twice: tuple[slice, slice] | None
    """Both places in the buffer of all keys that lie twice, fetched ones before own ones. `own` and pieces name the
    first place only."""
    receives: dict[int, tuple[Piece, ...]]
    """Pieces by the peer that owns them. In the backward pass gradients of the same pieces travel the other way."""
    sends: dict[int, tuple[Piece, ...]]
    """Pieces by the peer that needs them."""
    calls: tuple[ExchangeCall, ...]
    """Those with remote keys first, and of these the one with more: its gradients have the longest way to go."""

    @cached_property
    def copied(self) -> tuple[slice, slice] | None:
        """Both places of fetched keys that lie twice: the second is filled from the first."""
        if self.twice is None:
            return None
        fetched = self.own[0][1] - self.twice[0].start
        first, second = (slice(place.start, place.start + fetched) for place in self.twice)
        return (first, second) if fetched > 0 else None

    @cached_property
    def received_tokens(self) -> int:
        """Keys that travel to this rank in a forward pass."""
        return sum(piece.length for pieces in self.receives.values() for piece in pieces)

    @cached_property
    def sent_tokens(self) -> int:
        """Keys of this rank that travel to others, each as often as it does."""
        return sum(piece.length for pieces in self.sends.values() for piece in pieces)


def exchange_plan(
    sequence_length: int,
    context_parallel_size: int,
    cp_rank: int,
    window: int | None = None,
    boundaries: Sequence[int] | None = None,
    parts: list[Part] | None = None,
    joined: bool = False,
) -> ExchangePlan:
    """`boundaries` are one row's documents, 0 = b0 < b1 < ... < S, in positions of the full sequence; `parts`
    what each rank holds where that is not the zigzag. `joined`: one call for both chunks where the buffer stays within
    `buffer_room`. Without it documents are joined all the same where chunks share no key."""
    parts = parts or zigzag_parts(sequence_length, context_parallel_size)
    room = buffer_room(sequence_length, context_parallel_size, window, joined) if joined else 0
    layouts = [KeyLayout(part, window, boundaries, room) for part in parts]
    mine = layouts[cp_rank]
    return ExchangePlan(
        buffer_length=mine.buffer_length,
        largest_buffer=max(layout.buffer_length for layout in layouts),
        own=tuple((chunk.local, mine.buffer_index(chunk.start), chunk.length) for chunk in mine.chunks),
        own_again=mine.own_again,
        twice=mine.twice,
        receives={peer: pieces for peer, other in enumerate(layouts) if (pieces := _pieces(mine, other))},
        sends={peer: pieces for peer, other in enumerate(layouts) if (pieces := _pieces(other, mine))},
        calls=tuple(
            sorted(_as_one(_calls(mine), joined), key=lambda call: (not call.remote, call.k_start - call.k_stop))
        ),
    )


def _calls(layout: KeyLayout) -> list[ExchangeCall]:
    """One call for each chunk, in the order of their positions."""
    calls = []
    for chunk in layout.chunks:
        query_bounds = key_bounds = None
        if layout.boundaries is not None:
            inside = layout.boundaries[bisect.bisect_right(layout.boundaries, chunk.start) :]
            inner = [bound for bound in inside if bound < chunk.stop]
            query_bounds = (0, *(bound - chunk.start for bound in inner), chunk.length)
            key_bounds = (0, *(bound - chunk.low for bound in inner), chunk.stop - chunk.low)
        calls.append(
            ExchangeCall(
                q_start=chunk.local,
                q_stop=chunk.local + chunk.length,
                k_start=chunk.index,
                k_stop=chunk.key_stop,
                query_bounds=query_bounds,
                key_bounds=key_bounds,
                remote=chunk.low < chunk.start,  # between a rank's chunks lie tokens of others
            )
        )
    return calls


def _as_one(calls: list[ExchangeCall], joined: bool) -> list[ExchangeCall]:
    """One call for both chunks if their keys lie one after the other, and documents or `joined` ask for it."""
    if len(calls) < 2 or calls[0].k_stop != calls[1].k_start or not (joined or calls[0].query_bounds):
        return calls
    one, two = calls
    queries, keys = (
        first + tuple(first[-1] + bound for bound in second[1:])
        for first, second in zip(_bounds(one), _bounds(two), strict=True)
    )
    return [ExchangeCall(one.q_start, two.q_stop, one.k_start, two.k_stop, queries, keys, one.remote or two.remote)]


def _bounds(call: ExchangeCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Document bounds of queries and keys; all are one document if the call has none."""
    if call.query_bounds is not None and call.key_bounds is not None:
        return call.query_bounds, call.key_bounds
    return (0, call.q_stop - call.q_start), (0, call.k_stop - call.k_start)


def _pieces(receiver: KeyLayout, owner: KeyLayout) -> tuple[Piece, ...]:
    """What `receiver` needs of `owner`'s chunks, in the order of positions; nothing between a rank and itself."""
    if receiver is owner:
        return ()
    found = []
    for low, high in receiver.seen():
        for chunk in owner.chunks:
            first, last = max(low, chunk.start), min(high, chunk.stop)
            if first < last:
                places = receiver.buffer_index(first), owner.buffer_index(first), chunk.local + first - chunk.start
                found.append(Piece(first, last - first, *places))
    return tuple(sorted(found, key=lambda piece: piece.start))
