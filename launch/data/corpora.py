"""From the configuration's `data` section to the corpora of a run."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from launch.agreement import raised_on_all_ranks
from launch.config import JobConfig
from launch.data.batches import Batches, SampleSource, SequenceSampler
from launch.data.corpus import Corpus, CorpusError
from launch.data.cursor import BlendedSamples, DataCursor, Segment
from launch.data.indexed import open_indexed
from launch.data.skipped import in_words
from launch.data.sources import load_text
from launch.data.validation_split import split_corpus
from launch.plurals import counted


@dataclass(frozen=True)
class Corpora:
    """What a run trains on, by name, and what it is evaluated on: all held-out parts, one after the other."""

    training: dict[str, Corpus]
    validation: Corpus

    @property
    def fingerprint(self) -> str:
        """Equal on every rank that reads the same, whatever the weights. Of what the evaluation reads too: with more of
        it than the others a rank would wait for them without end."""
        return _digest(self.training_fingerprint, f"validation {self.validation.fingerprint}")

    @property
    def training_fingerprint(self) -> str:
        """Equal wherever the same is trained on, whatever the weights."""
        return _digest(*(f"{name} {self.training[name].fingerprint}" for name in sorted(self.training)))


def _digest(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_corpora(job: JobConfig) -> Corpora:
    """The corpora of `job`, split, each long enough for a sequence. Raises CorpusError."""
    data = job.data
    if data.source == "indexed":
        whole = {corpus.label: open_corpus(corpus.path, job.model.vocab_size) for corpus in data.blend}
    else:
        text = load_text(
            source=data.source,
            files=data.files,
            tokenizer=data.tokenizer,
            vocab_size=job.model.vocab_size,
            cache_directory=Path(data.cache_directory) if data.cache_directory else None,
        )
        whole = {data.source: text}
    held_out = [open_corpus(path, job.model.vocab_size, key="data.validation_paths") for path in data.validation_paths]
    training = {}
    for name, corpus in whole.items():
        training[name], validation = split(corpus, job)
        held_out += [validation] if validation is not None else []
    corpora = Corpora(training, Corpus.concatenated("validation", held_out))
    samplers(corpora, job)
    validation_sampler(corpora, job)
    return corpora


def split(corpus: Corpus, job: JobConfig) -> tuple[Corpus, Corpus | None]:
    """(training, validation) as the job holds out."""
    return split_corpus(corpus, 0 if job.data.validation_paths else job.data.validation_fraction, job.job.seed)


def corpora_on_all_ranks(job: JobConfig) -> Corpora:
    """The job's corpora, the same on every rank. Raises CorpusError on every rank where any has cause."""
    with raised_on_all_ranks(CorpusError):
        corpora = load_corpora(job)
    seen = [corpora.fingerprint] * dist.get_world_size()
    dist.all_gather_object(seen, corpora.fingerprint)
    for rank, fingerprint in enumerate(seen):
        if fingerprint != seen[0]:
            raise CorpusError(
                f"rank {rank} reads another corpus than rank 0 (fingerprints {fingerprint[:12]} and {seen[0][:12]}); "
                "give every node the same files, and for python_stdlib the same Python"
            )
    return corpora


def open_corpus(path: str, vocab_size: int | None = None, *, key: str = "data.blend") -> Corpus:
    """The corpus at `path`: a prefix, or a glob of prefixes whose shards are joined in the order of their names.

    `key` is where errors say that the path stands. Raises CorpusError.
    """
    prefixes = prefixes_of(path, key)
    corpus = Corpus.of_shards(path, [open_indexed(prefix, vocab_size) for prefix in prefixes])
    if not len(corpus):
        raise CorpusError(
            f"{path}: the corpus is empty: {counted(len(prefixes), 'shard')}, 0 tokens; leave it out of {key}"
        )
    return corpus


def prefixes_of(path: str, key: str) -> list[Path]:
    """The shards of the corpus at `path`: that prefix, or those of a glob by name. Raises CorpusError."""
    if not Path(path).name:
        raise CorpusError(f"{key}: {path!r} is a folder; add the name of a corpus in it, of its .bin and .idx")
    if not glob.has_magic(path) or os.path.exists(path + ".idx"):
        return [Path(path)]
    found = glob.glob(path + ".bin") + glob.glob(path + ".idx")
    if not found:
        raise CorpusError(f"{key}: no .bin or .idx matches {path!r} (looked from {os.getcwd()}); correct the glob")
    return [Path(prefix) for prefix in sorted({name[: -len(".bin")] for name in found})]


def samplers(corpora: Corpora, job: JobConfig) -> dict[str, SequenceSampler]:
    """Each training corpus in the job's sequences. Raises CorpusError where one is too short."""
    length, seed, packing = job.training.sequence_length, job.job.seed, job.data.packing
    return {
        name: SequenceSampler(corpus, length, seed, packing, f"{name} ") for name, corpus in corpora.training.items()
    }


def validation_sampler(corpora: Corpora, job: JobConfig) -> SequenceSampler:
    """Raises CorpusError where the validation corpus is too short."""
    return SequenceSampler(corpora.validation, job.training.sequence_length, job.job.seed, job.data.packing)


def training_batches(corpora: Corpora, job: JobConfig, cursor: DataCursor, dp_size: int, dp_rank: int) -> Batches:
    """What a data-parallel rank trains on, in the order of the run's cursor."""
    source = BlendedSamples(samplers(corpora, job), cursor)
    return replace(_batches(source, job, dp_size, dp_rank), offset=cursor.offset, skipped=cursor.skipped)


def validation_batches(corpora: Corpora, job: JobConfig, dp_size: int, dp_rank: int) -> Batches:
    """What a data-parallel rank evaluates on: every window of the validation corpus once, and then blanks."""
    sampler = validation_sampler(corpora, job)
    return replace(_batches(sampler, job, dp_size, dp_rank), limit=sampler.num_windows)


def _batches(source: SampleSource, job: JobConfig, dp_size: int, dp_rank: int) -> Batches:
    training = job.training
    return Batches(
        source, training.global_batch_size, training.micro_batch_size, dp_size, dp_rank, job.data.document_mask
    )


def fresh_cursor(corpora: Corpora, job: JobConfig) -> DataCursor:
    """The cursor of a run that starts with this configuration."""
    weights = {corpus.label: corpus.weight for corpus in job.data.blend} or dict.fromkeys(corpora.training, 1.0)
    return DataCursor(
        seed=job.job.seed,
        sequence_length=job.training.sequence_length,
        packing=job.data.packing,
        corpora={name: corpus.fingerprint for name, corpus in corpora.training.items()},
        history=(Segment(0, job.training.global_batch_size, weights),),
        skipped=job.training.skip_steps,
    )


def describe(corpora: Corpora, job: JobConfig, cursor: DataCursor, step: int) -> list[str]:
    """A line on each corpus: its size, and how much of it the run has read and will have read at its end. And one on
    the steps that are to be skipped."""
    last, end = cursor.history[-1].weights, max(step, job.total_steps)
    whole = sum(last.values())
    lines = []
    for name, sampler in samplers(corpora, job).items():
        epochs = [count[name] / sampler.num_windows for count in (cursor.read(step), cursor.read(end))]
        lines.append(
            f"corpus {name}: {len(sampler.corpus):,} tokens, {counted(sampler.corpus.num_documents, 'document')}, "
            f"weight {last.get(name, 0) / whole:.3f}; epochs read {epochs[0]:.2f}, "
            f"at the end of the job {epochs[1]:.2f}"
        )
    if ahead := cursor.skips(step, end):
        lines.append(f"{in_words(ahead)} will be skipped, as training.skip_steps says")
    return lines
