"""From a corpus to the micro-batches of a step, on the host.

Which tokens a step sees follows from the seed and the step alone: sample i of global batch t is global sample
t * global_batch_size + i, whatever the layout, and nothing is carried from step to step, so a resume needs no
cursor.

Shapes: B micro-batch rows, S sequence length, N tokens of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from launch.corpus import Corpus, CorpusError, Int64
from launch.shuffle import Permutation

IGNORED_LABEL = -100
"""A label that adds nothing to the loss: torch.nn.functional.cross_entropy's default."""


@dataclass(frozen=True)
class Sample:
    input_ids: Int64
    """[S]."""
    labels: Int64
    """[S] the token after each input, also where that token opens the next document."""
    document_starts: Int64
    """Positions p, 0 < p < S, at which another document begins; ascending."""


class SequenceSampler:
    """Global sample index -> Sample.

    Window w holds the inputs w*S .. w*S + S - 1 of the corpus and one token more for the last label. An epoch
    takes each of the floor((N - 1) / S) windows once, in an order of its own; so each token is an input once
    an epoch except for the tail, the last ((N - 1) mod S) + 1 tokens, of which only the first is seen, as a
    label.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int) -> None:
        """Raises CorpusError when the corpus is shorter than one window."""
        if len(corpus) <= sequence_length:
            share = "raise data.validation_fraction" if corpus.name == "validation" else "add text"
            raise CorpusError(
                f"the {corpus.name} corpus has {len(corpus)} tokens, but one sequence takes "
                f"{sequence_length + 1} (training.sequence_length and one label more); {share} or shorten "
                "training.sequence_length"
            )
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_windows = (len(corpus) - 1) // sequence_length

    def windows(self, indices: Int64) -> Int64:
        """The window of each global sample index (any shape); constant time and memory for each."""
        epochs, within = np.divmod(np.asarray(indices, dtype=np.int64), self.num_windows)
        out = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] = Permutation(self.num_windows, self.seed, f"epoch {epoch}")(within[chosen])
        return out

    def sample(self, window: int) -> Sample:
        start = window * self.sequence_length
        tokens = self.corpus.read(start, start + self.sequence_length + 1)
        starts = self.corpus.document_starts(start, start + self.sequence_length)
        return Sample(tokens[:-1], tokens[1:], starts)


@dataclass(frozen=True)
class MicroBatch:
    input_ids: Int64
    """[B, S]."""
    labels: Int64
    """[B, S] already shifted; IGNORED_LABEL where nothing is to be learned."""
    position_ids: Int64
    """[B, S] from 0 in each row, or in each document under a document mask."""
    boundaries: tuple[int, ...] | None
    """Under a document mask: where the documents begin among the B*S rows in row-major order, and B*S; rows
    end documents. None otherwise."""


@dataclass(frozen=True)
class Batches:
    """One data-parallel rank's part of every global batch."""

    sampler: SequenceSampler
    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    dp_rank: int
    document_mask: bool = False
    limit: int | None = None
    """Global samples from this index on are blank: every label is IGNORED_LABEL."""

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.micro_batch_size * self.data_parallel_size) == 0, self
        assert 0 <= self.dp_rank < self.data_parallel_size, self

    def global_batch(self, step: int) -> Int64:
        """[global_batch_size] the global sample indices of a step (counted from 0)."""
        return np.arange(self.global_batch_size, dtype=np.int64) + step * self.global_batch_size

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches, in the order of accumulation.

        Row m of accumulation step a on dp rank d is sample (a * data_parallel_size + d) * micro_batch_size +
        m of the global batch.
        """
        mine = self.global_batch(step).reshape(-1, self.data_parallel_size, self.micro_batch_size)[:, self.dp_rank]
        windows = self.sampler.windows(mine)
        return [
            self._assemble([self._sample(*one) for one in zip(*row, strict=True)])
            for row in zip(mine.tolist(), windows.tolist(), strict=True)
        ]

    def _sample(self, index: int, window: int) -> Sample:
        if self.limit is None or index < self.limit:
            return self.sampler.sample(window)
        blank = np.zeros(self.sampler.sequence_length, dtype=np.int64)
        return Sample(blank, blank + IGNORED_LABEL, blank[:0])

    def _assemble(self, samples: list[Sample]) -> MicroBatch:
        length = self.sampler.sequence_length
        positions = np.tile(np.arange(length, dtype=np.int64), (len(samples), 1))
        boundaries: list[int] = []
        if self.document_mask:
            for row, sample in enumerate(samples):
                boundaries += [row * length, *(row * length + sample.document_starts).tolist()]
                for start in sample.document_starts.tolist():
                    positions[row, start:] = np.arange(length - start)
            boundaries.append(len(samples) * length)
        return MicroBatch(
            input_ids=np.stack([sample.input_ids for sample in samples]),
            labels=np.stack([sample.labels for sample in samples]),
            position_ids=positions,
            boundaries=tuple(boundaries) if self.document_mask else None,
        )


def validation_batches(
    sampler: SequenceSampler,
    *,
    evaluation_batches: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    dp_rank: int,
    document_mask: bool = False,
) -> Iterator[list[MicroBatch]]:
    """The same global batches at every call, at most `evaluation_batches` of them, each as this rank's
    micro-batches.

    A corpus that holds fewer is seen whole and once: the rest of its last global batch is blank. Every rank
    gets as many batches as the others; a rank's micro-batch may be all blank.
    """
    batches = Batches(
        sampler,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        dp_rank,
        document_mask,
        limit=sampler.num_windows,
    )
    for step in range(min(evaluation_batches, -(-sampler.num_windows // global_batch_size))):
        yield batches.micro_batches(step)


T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls load(step) one step ahead, in one background thread, so that reading never stalls a step.

    Asking for another step than the one that was prepared is right, only not faster. An error in load is
    raised by the `get` of its step. Use as a context manager, or call `close`.
    """

    def __init__(self, load: Callable[[int], T], stop: int | None = None) -> None:
        """Steps from `stop` on are never prepared ahead."""
        self._load = load
        self._stop = stop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """load(step); starts load(step + 1) before it returns."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            batch = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            batch = self._thread.submit(self._load, step).result()
        if self._stop is None or step + 1 < self._stop:
            self._ahead = step + 1, self._thread.submit(self._load, step + 1)
        return batch

    def close(self) -> None:
        """Waits for the load in progress, if any; may be called twice."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
