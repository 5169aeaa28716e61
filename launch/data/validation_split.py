"""Which documents are held out for validation.

Shapes: G groups of documents.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from launch.data.corpus import Corpus, Int64
from launch.data.shuffle import Permutation

GROUPS = 4096
"""Documents are looked at in this many groups of neighbours at most, so that a billion cost no more than thousands."""


_GROUP = np.dtype([(name, np.int64) for name in ("shard", "first", "last", "start", "length")])
"""Neighbouring documents of a shard, together: first document and the one after the last, counted in the shard, where
the first begins in the shard's tokens, and tokens. None is empty."""
_Groups = npt.NDArray[np.void]
"""[G] of _GROUP, in the corpus's order."""


def split_corpus(corpus: Corpus, validation_fraction: float, seed: int) -> tuple[Corpus, Corpus | None]:
    """(training, validation) by document, deterministic from `seed`; a fraction of 0 gives no validation.

    `corpus` is one of whole shards. Documents (from the GROUPS-th on: groups of neighbours) are taken in an order
    shuffled by the seed, whenever one still fits into validation_fraction of the tokens. Where no group fits, one is
    taken apart. When no document is that small (one large file, say), the end of the largest is cut off instead.
    """
    assert 0 <= validation_fraction < 1, validation_fraction
    assert not corpus.starts.any(), "already split"
    groups = _whole_corpus(corpus)
    if validation_fraction == 0:
        return _selected(corpus, "training", groups), None
    target = max(1, round(validation_fraction * len(corpus)))
    while True:
        order = Permutation(len(groups), seed, "split")(np.arange(len(groups)))
        held_out = _fitting(groups["length"], order, target)
        if held_out.any():
            return _selected(corpus, "training", groups[~held_out]), _selected(corpus, "validation", groups[held_out])
        several = order[(groups["last"] - groups["first"])[order] > 1]
        if not len(several):
            break
        groups = _taken_apart(corpus, groups, int(several[0]))
    largest = int(np.argmax(groups["length"]))
    end = groups[largest : largest + 1].copy()
    end["start"] += end["length"] - target
    end["length"] = target
    groups["length"][largest] -= target
    return _selected(corpus, "training", groups[groups["length"] > 0]), _selected(corpus, "validation", end)


def _selected(corpus: Corpus, name: str, groups: _Groups) -> Corpus:
    return corpus.select(name, groups["shard"], groups["start"], groups["length"])


def _fitting(lengths: Int64, order: Int64, target: int) -> npt.NDArray[np.bool_]:
    """[G] which groups are held out: taken in `order`, each that still fits into `target` tokens."""
    taken, held_out = 0, np.zeros(len(lengths), dtype=bool)
    for group, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if taken + length <= target:
            taken += length
            held_out[group] = True
    return held_out


def _whole_corpus(corpus: Corpus) -> _Groups:
    """All documents, in GROUPS groups or fewer (one more for each shard)."""
    documents = np.cumsum([0, *(shard.num_documents for shard in corpus.shards)])
    edges = np.linspace(0, documents[-1], min(GROUPS, int(documents[-1])) + 1).astype(np.int64)
    parts = []
    for shard, (low, high) in enumerate(pairwise(documents)):
        inside = edges[(edges > low) & (edges < high)]
        parts.append(_grouped(corpus, shard, np.array([low, *inside, high], dtype=np.int64) - low))
    return np.concatenate(parts)


def _taken_apart(corpus: Corpus, groups: _Groups, which: int) -> _Groups:
    """`groups` with one of them in GROUPS groups or fewer."""
    shard, first, last, *_ = groups[which].tolist()
    edges = np.linspace(first, last, min(GROUPS, last - first) + 1).astype(np.int64)
    return np.concatenate([groups[:which], _grouped(corpus, shard, edges), groups[which + 1 :]])


def _grouped(corpus: Corpus, shard: int, edges: Int64) -> _Groups:
    """The documents between `edges` of one shard, without empty groups."""
    starts = corpus.shards[shard].begin(edges)
    groups = np.empty(len(edges) - 1, _GROUP)
    groups["shard"], groups["first"], groups["last"] = shard, edges[:-1], edges[1:]
    groups["start"], groups["length"] = starts[:-1], np.diff(starts)
    return groups[groups["length"] > 0]
