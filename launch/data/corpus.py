"""A corpus: tokens in memory or in mapped files, and where their documents begin.

Shapes: T tokens and D documents of a shard, N tokens and R runs of a corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from launch.data.sorted_search import search_left

Int64 = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer]


class CorpusError(ValueError):
    """A corpus that cannot be trained on; the message says what to change."""


@dataclass(frozen=True)
class Shard:
    """Tokens that lie one after the other, with the index of Megatron's format (see `launch.data.indexed`).

    The index may be mapped, and of a billion documents: it is bisected where it is needed and never read whole.
    """

    name: str
    """Its name in errors: the path without `.bin`, or the source of a text."""
    tokens: Tokens
    """[T]."""
    pointers: Int64
    """Byte at which each sequence begins, ascending; a sequence ends where the next begins."""
    documents: Int64
    """[D + 1] the first sequence of each document, and the number of sequences."""
    fingerprint: str
    """Hex digest of tokens and documents: equal wherever the same data lie."""
    vocab_size: int | None = None
    """Reading a token id that is not below it is an error; None lets every id pass."""

    @classmethod
    def in_memory(cls, name: str, tokens: Tokens, lengths: npt.ArrayLike, fingerprint: str) -> Shard:
        """A shard of all of `tokens`; document `lengths` [D] must add up to them, empty documents are left out."""
        sizes = np.asarray(lengths, dtype=np.int64)
        sizes = sizes[sizes > 0]
        assert sizes.sum() == len(tokens), (sizes.sum(), len(tokens))
        pointers = _offsets(sizes)[:-1] * tokens.itemsize
        return cls(name, tokens, pointers, np.arange(len(sizes) + 1), fingerprint)

    @property
    def num_documents(self) -> int:
        """D, empty ones included."""
        return len(self.documents) - 1

    def begin(self, documents: Int64) -> Int64:
        """Where in `tokens` each of `documents` [n] (0 to D) begins; T for D."""
        sequences = self.documents[documents]
        inside = sequences < len(self.pointers)
        positions = np.full(len(sequences), len(self.tokens), dtype=np.int64)
        positions[inside] = self.pointers[sequences[inside]] // self.tokens.itemsize
        return positions

    def document_at(self, position: int) -> int:
        """The first document that begins at `position` of `tokens` or later; D where none does."""
        sequence, documents = search_left(self.pointers, position * self.tokens.itemsize), self.documents
        last = min(sequence, self.num_documents)
        if documents[last] == sequence and (not last or documents[last - 1] < sequence):
            return last  # as many documents as sequences up to here: mostly one of each
        return min(search_left(documents, sequence), self.num_documents)

    def document_starts(self, start: int, stop: int) -> Int64:
        """The positions p of `tokens`, start <= p < stop, at which a document begins, ascending; each once."""
        return np.unique(self.begin(np.arange(self.document_at(start), self.document_at(stop))))

    def read(self, start: int, stop: int) -> Int64:
        """[stop - start] tokens. Raises CorpusError where one is beyond the vocabulary."""
        found = self.tokens[start:stop].astype(np.int64)
        if self.vocab_size is not None and found.size and int(found.view(np.uint64).max()) >= self.vocab_size:
            at = int(np.flatnonzero(found.view(np.uint64) >= self.vocab_size)[0])
            raise beyond_vocabulary(f"{self.name}, token {start + at:,}", int(found[at]), self.vocab_size)
        return found


def beyond_vocabulary(where: str, token: int, vocab_size: int) -> CorpusError:
    """The error of a token id that the model has no embedding for."""
    remedy = f"set model.vocab_size to at least {token + 1}, or give the corpus of this model's tokenizer"
    if token < 0:
        remedy = "the file is damaged, or no corpus"
    return CorpusError(f"{where}: the token id {token} is beyond model.vocab_size ({vocab_size}); {remedy}")


@dataclass(frozen=True)
class Corpus:
    """Runs of the documents of shards, one after the other, read through `read`. A split copies nothing."""

    name: str
    """Its name in errors: "training", "validation"."""
    shards: tuple[Shard, ...]
    shard_of: Int64
    """[R] the shard that each run lies in."""
    starts: Int64
    """[R] where in that shard's tokens the run begins; a document begins there too."""
    offsets: Int64
    """[R + 1] where each run begins in this corpus; offsets[0] = 0, offsets[R] = N. No run is empty."""
    fingerprint: str
    """Hex digest of tokens and documents: equal on every rank and every resume that sees the same data."""

    @classmethod
    def of_shards(cls, name: str, shards: Sequence[Shard]) -> Corpus:
        """All documents of `shards`, in their order."""
        lengths = np.array([len(shard.tokens) for shard in shards], dtype=np.int64)
        full = np.flatnonzero(lengths)
        digest = shards[0].fingerprint if len(shards) == 1 else _digest(*(shard.fingerprint for shard in shards))
        return cls(name, tuple(shards), full, np.zeros_like(full), _offsets(lengths[full]), digest)

    @classmethod
    def from_documents(cls, name: str, tokens: Tokens, lengths: npt.ArrayLike, fingerprint: str) -> Corpus:
        """A corpus in memory: see `Shard.in_memory`."""
        return cls.of_shards(name, [Shard.in_memory(name, tokens, lengths, fingerprint)])

    @classmethod
    def concatenated(cls, name: str, parts: Sequence[Corpus]) -> Corpus:
        """The corpora `parts`, one after the other."""
        if len(parts) == 1:
            return replace(parts[0], name=name)
        firsts = np.cumsum([0, *(len(part.shards) for part in parts[:-1])])
        return cls(
            name,
            tuple(shard for part in parts for shard in part.shards),
            np.concatenate([part.shard_of + first for part, first in zip(parts, firsts, strict=True)]),
            np.concatenate([part.starts for part in parts]),
            _offsets(np.concatenate([np.diff(part.offsets) for part in parts])),
            _digest(*(part.fingerprint for part in parts)),
        )

    def select(self, name: str, shard_of: Int64, starts: Int64, lengths: Int64) -> Corpus:
        """The runs that begin at `starts` [R'] of shards `shard_of` [R'] and have `lengths` [R'], none empty."""
        apart = np.ones(len(starts), dtype=bool)
        apart[1:] = (shard_of[1:] != shard_of[:-1]) | (starts[1:] != starts[:-1] + lengths[:-1])
        lengths = np.add.reduceat(lengths, np.flatnonzero(apart)) if len(lengths) else lengths
        shard_of, starts = shard_of[apart], starts[apart]
        digest = _digest(self.fingerprint, *(part.tobytes().hex() for part in (shard_of, starts, lengths)))
        return Corpus(name, self.shards, shard_of, starts, _offsets(lengths), digest)

    def __len__(self) -> int:
        """N, in tokens."""
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        """Documents that begin in the runs."""
        ends = self.starts + np.diff(self.offsets)
        runs = zip(self.shard_of.tolist(), self.starts.tolist(), ends.tolist(), strict=True)
        return sum(self.shards[s].document_at(end) - self.shards[s].document_at(start) for s, start, end in runs)

    def read(self, start: int, stop: int) -> Int64:
        """[stop - start] int64: tokens start..stop-1 of this corpus, across documents. Raises CorpusError."""
        pieces = [shard.read(begin, end) for _, shard, begin, end in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])

    def document_starts(self, start: int, stop: int) -> Int64:
        """Positions p, 0 < p < stop - start, at which tokens start..stop-1 enter another document; ascending."""
        found = [np.zeros(1, np.int64)]
        for at, shard, begin, end in self._pieces(start, stop):
            found += [np.array([at]), shard.document_starts(begin, end) - begin + at]
        return np.unique(np.concatenate(found))[1:]

    def documents(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """(shard, first, last): the documents, numbered as in their shard, that tokens start..stop-1 belong to."""
        return [
            (shard.name, shard.document_at(begin + 1) - 1, shard.document_at(end) - 1)
            for _, shard, begin, end in self._pieces(start, stop)
        ]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, Shard, int, int]]:
        """(p, shard, begin, end): the tokens from start + p on are shard.tokens[begin:end]; tiles start..stop-1."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        run, position = int(np.searchsorted(self.offsets, start, side="right")) - 1, start
        while position < stop:
            end = min(int(self.offsets[run + 1]), stop)
            begin = int(self.starts[run]) + position - int(self.offsets[run])
            yield position - start, self.shards[int(self.shard_of[run])], begin, begin + end - position
            position, run = end, run + 1


def _offsets(lengths: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
