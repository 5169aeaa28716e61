"""Lays documents into windows of one sequence: which stretches of the corpus each window holds.

Each token of the corpus lies in exactly one window. The contents of a window follow from its number and the corpus
alone, so there is no index to build: `split` plans nothing, and `best_fit` plans GROUP windows at a time.

Shapes: N tokens of the corpus, S sequence length, W windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

from launch.data.corpus import Corpus

Stretch = tuple[int, int]
"""(start, stop) in tokens of the corpus."""

GROUP = 64
"""Windows that best_fit plans together. More would cut fewer documents and take longer to plan."""

Packing = Callable[[int], list[Stretch]]
"""Window -> its stretches, in its order; together S tokens. What the corpus lacks to fill all W windows, less than S,
is missing in one of the last, or in several (best_fit)."""


def _split(corpus: Corpus, sequence_length: int) -> Packing:
    """Documents one after the other as they lie in the corpus, cut where a window ends: window w is the tokens w * S to
    w * S + S - 1. The last window is as long as what is left."""

    def window(index: int) -> list[Stretch]:
        start = index * sequence_length
        return [(start, min(start + sequence_length, len(corpus)))]

    return window


def _best_fit(corpus: Corpus, sequence_length: int) -> Packing:
    """Documents rearranged inside groups of GROUP windows, so that few are cut and nothing is padded.

    A group is GROUP * S consecutive tokens. Its documents (one longer than S: in pieces of S and a rest) go, longest
    first, each to the window with the least room that takes it (best-fit decreasing; its use for training: Ding et al.,
    "Fewer truncations improve language modeling", arXiv:2404.10830). What fits nowhere whole is cut to fill the gaps,
    which add up to exactly that: so a group has as many windows as its tokens fill, and the first window of every group
    is known without planning those before it.
    """

    @lru_cache(maxsize=256)
    def planned(group: int) -> list[list[Stretch]]:
        begin = group * GROUP * sequence_length
        end = min(begin + GROUP * sequence_length, len(corpus))
        edges = [begin, *(corpus.document_starts(begin, end) + begin).tolist(), end]
        return best_fit(list(pairwise(edges)), sequence_length)

    return lambda index: planned(index // GROUP)[index % GROUP]


def best_fit(documents: list[Stretch], length: int) -> list[list[Stretch]]:
    """The documents in ceil(tokens / length) windows of at most `length`, in each the stretches in their order."""
    pieces = [(start, min(start + length, stop)) for first, stop in documents for start in range(first, stop, length)]
    count = -(-sum(stop - start for start, stop in pieces) // length)
    windows: list[list[Stretch]] = [[] for _ in range(count)]
    rooms = [(length, index) for index in range(count)]  # ascending
    left_over = []
    for start, stop in sorted(pieces, key=lambda piece: (piece[0] - piece[1], piece[0])):
        place = bisect_left(rooms, (stop - start, -1))
        if place == len(rooms):
            left_over.append((start, stop))
            continue
        room, index = rooms.pop(place)
        windows[index].append((start, stop))
        insort(rooms, (room - (stop - start), index))
    gaps = sorted(((index, room) for room, index in rooms if room), reverse=True)
    for start, stop in left_over:
        while start < stop:
            index, room = gaps.pop()
            taken = min(room, stop - start)
            windows[index].append((start, start + taken))
            start += taken
            if taken < room:
                gaps.append((index, room - taken))
    return [_merged(sorted(window)) for window in windows]


def _merged(stretches: list[Stretch]) -> list[Stretch]:
    """Ascending stretches, with those that touch as one."""
    out = stretches[:1]
    for start, stop in stretches[1:]:
        if start == out[-1][1]:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


PACKINGS: dict[str, Callable[[Corpus, int], Packing]] = {"split": _split, "best_fit": _best_fit}
