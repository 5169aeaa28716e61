"""Which keys a rank's queries see, and where they lie in its buffer.

A query chunk [a, b) sees one contiguous range of keys, [low, b). Causality ends it at b. It begins where the window of
the first query or the first query's document begins. A rank has two chunks at most, so its buffer holds two ranges at
most, in the order of their positions.

Positions are those of the full sequence. "Local" indices count within a rank's part, "buffer" indices within its
buffer.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.sequence import Part


def buffer_room(sequence_length: int, context_parallel_size: int, window: int | None, joined: bool) -> int:
    """The most keys that a buffer holds: the sequence, and a rank's share of it twice where calls may be joined. Under
    a window no more than the share and what each of its two chunks sees before itself."""
    share = sequence_length // context_parallel_size
    room = sequence_length + (share if joined else 0)
    return room if window is None else min(room, share + 2 * (window - 1))


@dataclass(frozen=True)
class Chunk:
    """Queries [start, stop), the first at `local` of their rank's, and their keys [low, stop), the first at `index` of
    its buffer."""

    local: int
    start: int
    stop: int
    low: int
    index: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def key_stop(self) -> int:
        """In the buffer."""
        return self.index + self.stop - self.low


class KeyLayout:
    """One rank's queries, the keys they need, and where these lie in its buffer: one chunk's after the other's."""

    def __init__(self, part: Part, window: int | None, boundaries: Sequence[int] | None, room: int):
        """`part`: the rank's positions; `boundaries`: documents of the full sequence. Chunks whose keys overlap share
        the overlap, unless the buffer has `room` (in keys) to hold it twice."""
        self.window, self.boundaries = window, boundaries
        self.chunks: list[Chunk] = []
        """In the order of their positions."""
        local = index = 0
        for start, stop in part:
            self.chunks.append(Chunk(local, start, stop, self._lowest_key(start), index))
            local, index = local + stop - start, self.chunks[-1].key_stop
        self.twice: tuple[slice, slice] | None = None
        """Both places of the keys that lie twice."""
        if len(self.chunks) < 2 or self.chunks[1].low >= self.chunks[0].stop:
            return
        one, two = self.chunks
        if two.key_stop > room:
            self.chunks[1] = replace(two, index=one.index + two.low - one.low)
        else:
            both = one.stop - two.low
            self.twice = slice(one.key_stop - both, one.key_stop), slice(two.index, two.index + both)

    @property
    def buffer_length(self) -> int:
        """Keys."""
        return self.chunks[-1].key_stop

    @property
    def own_again(self) -> tuple[int, int, int] | None:
        """(local index, second place in the buffer, length) of this rank's own keys among those that lie twice."""
        if self.twice is None:
            return None
        one, two = self.chunks
        length = one.stop - max(one.start, two.low)  # one's own keys are the last it sees
        return one.local + one.length - length, self.twice[1].stop - length, length

    def seen(self) -> list[tuple[int, int]]:
        """Ranges of positions in the buffer; none twice."""
        stops = [0, *(chunk.stop for chunk in self.chunks)]
        return [(max(chunk.low, stop), chunk.stop) for chunk, stop in zip(self.chunks, stops, strict=False)]

    def buffer_index(self, position: int) -> int:
        """Where this key lies, or lies first."""
        chunk = next(chunk for chunk in self.chunks if chunk.low <= position < chunk.stop)
        return chunk.index + position - chunk.low

    def _lowest_key(self, query: int) -> int:
        """First key that the query at this position sees."""
        low = 0
        if self.boundaries is not None:
            low = self.boundaries[bisect.bisect_right(self.boundaries, query) - 1]
        if self.window is not None:
            low = max(low, query - self.window + 1)
        return low
