"""From corpora to the micro-batches of a step, on the host.

Which tokens a step sees follows from the seed, the step and the history of the blend (`launch.data.cursor`): sample i
of global batch t is global sample t * global_batch_size + i, whatever the layout.

Shapes: B micro-batch rows, S sequence length, N tokens of the corpus, W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from launch.data.corpus import Corpus, CorpusError, Int64
from launch.data.packing import PACKINGS
from launch.data.shuffle import Permutation
from launch.data.skipped import StepRanges, steps_made
from model.kernels.linear_cross_entropy import IGNORED_LABEL


@dataclass(frozen=True)
class Sample:
    """One sequence."""

    input_ids: Int64
    """[S]."""
    labels: Int64
    """[S] the token after each input in its corpus, also where that token opens the next document; IGNORED_LABEL for
    the corpus's last token and for padding."""
    document_starts: Int64
    """Positions p, 0 < p < S, at which another document, or the padding, begins; ascending."""

    def digest(self, index: int) -> int:
        """64 bits of BLAKE2 of all three (in 32 bits each) and of `index`, the global sample that it is."""
        said = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8)
        for part in (self.input_ids, self.labels, self.document_starts):
            said.update(part.astype("<i4").data)
        return int.from_bytes(said.digest(), "little")


class SampleSource(Protocol):
    """An endless sequence of samples."""

    sequence_length: int

    def samples(self, indices: Int64) -> list[Sample]:
        """The samples of these indices [n], in their order."""


class SequenceSampler:
    """The samples of one corpus: an epoch is each of its windows once, in an order of its own.

    Every token of the corpus lies in exactly one window (`launch.data.packing`), so each is an input exactly once an
    epoch. A last window that the corpus does not fill is padded with ignored labels: an epoch then has the same windows
    every time, and what it saw can be accounted for. A draw costs constant time and memory whatever the size of the
    corpus.
    """

    def __init__(
        self, corpus: Corpus, sequence_length: int, seed: int, packing: str = "split", stream: str = ""
    ) -> None:
        """`stream` separates corpora that share a seed. Raises CorpusError when the corpus fills no sequence."""
        if len(corpus) <= sequence_length:
            share = "raise data.validation_fraction" if corpus.name == "validation" else "add text"
            raise CorpusError(
                f"the {corpus.name} corpus has {len(corpus)} tokens, but one sequence takes "
                f"{sequence_length + 1} (training.sequence_length and one label more); {share} or shorten "
                "training.sequence_length"
            )
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.stretches = PACKINGS[packing](corpus, sequence_length)
        self.num_windows = -(-len(corpus) // sequence_length)
        self._seed, self._stream = seed, stream

    def windows(self, indices: Int64) -> Int64:
        """The window of each sample index (any shape)."""
        epochs, within = np.divmod(np.asarray(indices, dtype=np.int64), self.num_windows)
        out = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            permutation = Permutation(self.num_windows, self._seed, f"{self._stream}epoch {epoch}")
            out[chosen] = permutation(within[chosen])
        return out

    def samples(self, indices: Int64) -> list[Sample]:
        """See `SampleSource`."""
        return [self.sample(window) for window in self.windows(indices).tolist()]

    def sample(self, window: int) -> Sample:
        """Raises CorpusError where the corpus cannot be read."""
        input_ids = np.zeros(self.sequence_length, dtype=np.int64)
        labels = np.full(self.sequence_length, IGNORED_LABEL, dtype=np.int64)
        starts, position = [], 0
        for start, stop in self.stretches(window):
            end, after = position + stop - start, min(stop + 1, len(self.corpus))
            tokens = self.corpus.read(start, after)
            input_ids[position:end] = tokens[: stop - start]
            labels[position : position + after - start - 1] = tokens[1:]
            starts += [np.array([position]), self.corpus.document_starts(start, stop) + position]
            position = end
        starts.append(np.array([position] if position < self.sequence_length else [], dtype=np.int64))
        return Sample(input_ids, labels, np.concatenate(starts)[1:])


@dataclass(frozen=True)
class MicroBatch:
    """What a data-parallel rank feeds in one forward pass, whole sequences."""

    input_ids: Int64
    """[B, S]."""
    labels: Int64
    """[B, S] already shifted; IGNORED_LABEL where nothing is to be learned."""
    position_ids: Int64
    """[B, S] from 0 in each row, or in each document under a document mask."""
    boundaries: tuple[int, ...] | None
    """Under a document mask: where the documents begin among the B*S rows in row-major order, and B*S; rows end
    documents. None otherwise."""


@dataclass(frozen=True)
class Batches:
    """One data-parallel rank's part of every global batch."""

    source: SampleSource
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    dp_rank: int
    document_mask: bool = False
    limit: int | None = None
    """Global samples from this index on are blank: every label is IGNORED_LABEL."""
    offset: int = 0
    """Global sample of step 0, had global_batch_size always been what it is now; negative where it was smaller."""
    skipped: StepRanges = ()
    """Steps that are not to be read."""
    note: Callable[[int, Int64, list[Sample]], None] | None = None
    """Called for each step that is read, with the step, the global sample indices and the samples."""

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.micro_batch_size * self.data_parallel_size) == 0, self
        assert 0 <= self.dp_rank < self.data_parallel_size, self

    def steps(self, start: int, stop: int) -> Iterator[int]:
        """Which of the steps from `start` up to `stop` are to be read."""
        return steps_made(self.skipped, start, stop)

    def global_batch(self, step: int) -> Int64:
        """[global_batch_size] the global sample indices of a step (counted from 0)."""
        return np.arange(self.global_batch_size, dtype=np.int64) + step * self.global_batch_size + self.offset

    def local_batch(self, step: int) -> Int64:
        """[accumulation steps, B] the global sample indices of a step that this rank feeds.

        Row m of accumulation step a on dp rank d is sample (a * data_parallel_size + d) * micro_batch_size + m of the
        global batch.
        """
        parts = self.global_batch(step).reshape(-1, self.data_parallel_size, self.micro_batch_size)
        return parts[:, self.dp_rank]

    def samples(self, indices: Int64) -> list[Sample]:
        """The samples of these global indices [n]. Raises CorpusError where a corpus cannot be read."""
        if self.limit is None:
            return self.source.samples(indices)
        real = iter(self.source.samples(indices[indices < self.limit]))
        blank = np.zeros(self.source.sequence_length, dtype=np.int64)
        padding = Sample(blank, blank + IGNORED_LABEL, blank[:0])
        return [next(real) if index < self.limit else padding for index in indices.tolist()]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches, in the order of accumulation. Raises CorpusError."""
        indices = self.local_batch(step).reshape(-1)
        samples = self.samples(indices)
        if self.note is not None:
            self.note(step, indices, samples)
        rows = self.micro_batch_size
        return [self._assembled(samples[first : first + rows]) for first in range(0, len(samples), rows)]

    def once(self, most: int) -> Iterator[list[MicroBatch]]:
        """The global batches up to `limit`, `most` of them at most, each as this rank's micro-batches.

        The rest of the last one is blank. Every rank gets as many as the others; all of a micro-batch may be blank.
        """
        assert self.limit is not None
        for step in range(min(most, -(-self.limit // self.global_batch_size))):
            yield self.micro_batches(step)

    def _assembled(self, samples: list[Sample]) -> MicroBatch:
        length = self.source.sequence_length
        steady = np.arange(length, dtype=np.int64)
        positions = np.tile(steady, (len(samples), 1))
        boundaries: list[int] = []
        if self.document_mask:
            for row, sample in enumerate(samples):
                starts = np.concatenate([steady[:1], sample.document_starts])
                positions[row] -= np.repeat(starts, np.diff(starts, append=length))
                boundaries += (row * length + starts).tolist()
            boundaries.append(len(samples) * length)
        return MicroBatch(
            input_ids=np.stack([sample.input_ids for sample in samples]),
            labels=np.stack([sample.labels for sample in samples]),
            position_ids=positions,
            boundaries=tuple(boundaries) if self.document_mask else None,
        )
