"""Which documents are held out for validation.

Shapes: G groups of documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from launch.data.corpus import Corpus, Int64
from launch.data.shuffle import Permutation

GROUPS = 4096
"""Documents are looked at in this many groups of neighbours at most, so that a billion cost no more than thousands."""


@dataclass(frozen=True)
class _Groups:
    """Neighbouring documents of a shard, together: none empty, in the corpus's order."""

    shard_of: Int64
    """[G]."""
    first: Int64
    """[G] first document, in the shard."""
    last: Int64
    """[G] the one after the last document."""
    starts: Int64
    """[G] where the first begins, in the shard's tokens."""
    lengths: Int64
    """[G] tokens."""

    def __len__(self) -> int:
        return len(self.lengths)


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
        return corpus.select("training", groups.shard_of, groups.starts, groups.lengths), None
    target = max(1, round(validation_fraction * len(corpus)))
    while True:
        order = Permutation(len(groups), seed, "split")(np.arange(len(groups)))
        held_out = _fitting(groups.lengths, order, target)
        several = order[(groups.last - groups.first)[order] > 1]
        if held_out.any() or not len(several):
            break
        groups = _taken_apart(corpus, groups, int(several[0]))
    if held_out.any():
        training, validation = (
            corpus.select(name, groups.shard_of[kept], groups.starts[kept], groups.lengths[kept])
            for name, kept in (("training", ~held_out), ("validation", held_out))
        )
        return training, validation
    largest = int(np.argmax(groups.lengths))
    kept = groups.lengths.copy()
    kept[largest] -= target
    one = slice(largest, largest + 1)
    full = kept > 0
    training = corpus.select("training", groups.shard_of[full], groups.starts[full], kept[full])
    end = np.array([target], dtype=np.int64)
    return training, corpus.select("validation", groups.shard_of[one], groups.starts[one] + kept[largest], end)


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
    for shard, (low, high) in enumerate(zip(documents[:-1], documents[1:], strict=True)):
        inside = edges[(edges > low) & (edges < high)]
        parts.append(_grouped(corpus, shard, np.array([low, *inside, high], dtype=np.int64) - low))
    return _joined(parts)


def _taken_apart(corpus: Corpus, groups: _Groups, which: int) -> _Groups:
    """`groups` with one of them in GROUPS groups or fewer."""
    first, last = int(groups.first[which]), int(groups.last[which])
    edges = np.linspace(first, last, min(GROUPS, last - first) + 1).astype(np.int64)
    middle = _grouped(corpus, int(groups.shard_of[which]), edges)
    return _joined([_sliced(groups, slice(which)), middle, _sliced(groups, slice(which + 1, None))])


def _grouped(corpus: Corpus, shard: int, edges: Int64) -> _Groups:
    """The documents between `edges` of one shard, without empty groups."""
    starts = corpus.shards[shard].begin(edges)
    lengths = np.diff(starts)
    parts = _Groups(np.full(len(lengths), shard), edges[:-1], edges[1:], starts[:-1], lengths)
    return _sliced(parts, lengths > 0)


def _sliced(groups: _Groups, chosen: slice | npt.NDArray[np.bool_]) -> _Groups:
    return _Groups(*(getattr(groups, name)[chosen] for name in _Groups.__dataclass_fields__))


def _joined(parts: list[_Groups]) -> _Groups:
    return _Groups(*(np.concatenate([getattr(p, name) for p in parts]) for name in _Groups.__dataclass_fields__))
