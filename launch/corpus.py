"""A corpus: tokens on disk or in memory, and where its documents begin.

Shapes: T tokens of storage, N tokens of this corpus, D documents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from launch.shuffle import Permutation

Int64 = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.unsignedinteger]


class CorpusError(ValueError):
    """A corpus that cannot be trained on; the message says what to change."""


@dataclass(frozen=True)
class Corpus:
    """Documents, one after the other, read through `read`.

    The tokens lie in one flat array that may be memory-mapped and shared with other corpora: document d is
    tokens[starts[d] : starts[d] + offsets[d + 1] - offsets[d]], so a split copies nothing. A foreign indexed
    format (flat tokens plus document pointers) becomes a corpus by filling in these fields.
    """

    name: str
    """What errors call it: "training", "validation"."""
    tokens: Tokens
    """[T] unsigned integers."""
    starts: Int64
    """[D] where each document begins in `tokens`."""
    offsets: Int64
    """[D + 1] where each document begins in this corpus; offsets[0] = 0, offsets[D] = N. No document is
    empty."""
    fingerprint: str
    """Hex digest of tokens and documents: equal on every rank and every resume that sees the same data."""

    @classmethod
    def from_documents(cls, name: str, tokens: Tokens, lengths: npt.ArrayLike, fingerprint: str) -> Corpus:
        """A corpus of all of `tokens`; `lengths` [D] must add up to them, empty documents are left out."""
        sizes = np.asarray(lengths, dtype=np.int64)
        sizes = sizes[sizes > 0]
        offsets = _offsets(sizes)
        assert offsets[-1] == len(tokens), (offsets[-1], len(tokens))
        return cls(name, tokens, offsets[:-1], offsets, fingerprint)

    def select(self, name: str, starts: Int64, lengths: Int64) -> Corpus:
        """The documents that begin at `starts` [D'] of storage and have `lengths` [D']."""
        digest = hashlib.sha256(self.fingerprint.encode() + starts.tobytes() + lengths.tobytes()).hexdigest()
        return Corpus(name, self.tokens, starts, _offsets(lengths), digest)

    def __len__(self) -> int:
        """N, in tokens."""
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    def read(self, start: int, stop: int) -> Int64:
        """[stop - start] int64: tokens start..stop-1 of this corpus, across documents."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        out = np.empty(stop - start, dtype=np.int64)
        position = start
        document = int(np.searchsorted(self.offsets, start, side="right")) - 1
        while position < stop:
            begin, end = int(self.offsets[document]), min(int(self.offsets[document + 1]), stop)
            source = int(self.starts[document]) + position - begin
            out[position - start : end - start] = self.tokens[source : source + end - position]
            position, document = end, document + 1
        return out

    def document_starts(self, start: int, stop: int) -> Int64:
        """Positions p, 0 < p < stop - start, at which tokens start..stop-1 enter another document;
        ascending."""
        first = np.searchsorted(self.offsets, start, side="right")
        last = np.searchsorted(self.offsets, stop, side="left")
        return self.offsets[first:last] - start


def _offsets(lengths: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def split_corpus(corpus: Corpus, validation_fraction: float, seed: int) -> tuple[Corpus, Corpus | None]:
    """(training, validation) by document, deterministic from `seed`; a fraction of 0 gives no validation.

    Documents are taken in an order shuffled by the seed, whenever one still fits into validation_fraction of
    the tokens. When none is that small (one large file, say), the end of the largest is cut off instead.
    """
    assert 0 <= validation_fraction < 1, validation_fraction
    lengths = np.diff(corpus.offsets)
    if validation_fraction == 0:
        return corpus.select("training", corpus.starts, lengths), None
    target = max(1, round(validation_fraction * len(corpus)))
    order = Permutation(corpus.num_documents, seed, "split")(np.arange(corpus.num_documents))
    taken, held_out = 0, np.zeros(corpus.num_documents, dtype=bool)
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if taken + length <= target:
            taken += length
            held_out[document] = True
    if taken:
        training = corpus.select("training", corpus.starts[~held_out], lengths[~held_out])
        return training, corpus.select("validation", corpus.starts[held_out], lengths[held_out])
    largest = int(np.argmax(lengths))
    kept = lengths.copy()
    kept[largest] -= target
    cut = corpus.starts[largest : largest + 1] + kept[largest]
    training = corpus.select("training", corpus.starts[kept > 0], kept[kept > 0])
    return training, corpus.select("validation", cut, np.array([target], dtype=np.int64))


def conditional_bigram_entropy(tokens: npt.ArrayLike) -> float:
    """H(x_t | x_{t-1}) of `tokens` [N >= 2] under their own exact pair counts, in nats per token.

    The loss of the best predictor that sees only the previous token and has the answers: with n_ab the count
    of the pair (a, b) and n_a that of a as a predecessor, (sum_a n_a log n_a - sum_ab n_ab log n_ab) / (N -
    1) (Cover and Thomas, Elements of Information Theory, section 2.2).
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if len(ids) < 2:
        raise CorpusError(f"an entropy of pairs needs at least 2 tokens, not {len(ids)}; add text to the corpus")
    width = int(ids.max()) + 1
    pairs = np.unique(ids[:-1] * width + ids[1:], return_counts=True)[1].astype(np.float64)
    firsts = np.unique(ids[:-1], return_counts=True)[1].astype(np.float64)
    return float((firsts @ np.log(firsts) - pairs @ np.log(pairs)) / (len(ids) - 1))
