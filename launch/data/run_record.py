"""Reads what a run left of the data it read: the ranks' notes, the cursor, and the corpora that still exist."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path

import numpy as np

from launch.config import JobConfig
from launch.data.batches import SequenceSampler
from launch.data.corpora import load_corpora, open_corpus, samplers, split
from launch.data.corpus import Corpus, CorpusError, Int64
from launch.data.cursor import DataCursor
from launch.data.data_log import WHOLE, read_paths

_LEAST_NOTED = 100
"""One sample in so many, at least, must be noted: a step far from all others is damage, and would be counted up to."""


@dataclass(frozen=True)
class Noted:
    """The notes of all ranks about a step."""

    samples: int
    digest: int


@dataclass(frozen=True)
class RunRecord:
    """What the ranks noted, what the data cursor says they should have read, and the corpora."""

    cursor: DataCursor
    noted: dict[int, Noted]
    """The notes by step, counted from 0; those from before the data began anew are in no step of the cursor's."""
    samplers: dict[str, SequenceSampler]
    """Those of the cursor's corpora that can be read."""

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """Raises CorpusError, ConfigError or OSError where the records or the corpora cannot be read."""
        job = JobConfig.of_run(directory)
        path = directory / "data" / "cursor.json"
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CorpusError(f"{path}: cannot be read ({error}); a run writes it as it begins: restore it") from error
        cursor, corpora = DataCursor.from_record(record), load_corpora(job)
        for name, corpus in corpora.training.items():
            if cursor.corpora.get(name) != corpus.fingerprint:
                raise CorpusError(
                    f"corpus {name} is not what the run read (fingerprint {str(cursor.corpora.get(name))[:12]}, here "
                    f"{corpus.fingerprint[:12]}); restore it, and start where the run was started"
                )
        training = corpora.training | _left_out(directory / "data", cursor, job)
        run = cls(cursor, _noted(directory / "data"), samplers(replace(corpora, training=training), job))
        if not run.steps:
            raise CorpusError(
                f"{directory / 'data'}: dp-*.jsonl hold no whole step; restore them, there is nothing to prove"
            )
        there, noted = cursor.read(run.steps.stop).total(), run.samples_noted
        if there > _LEAST_NOTED * noted:
            raise CorpusError(
                f"{directory / 'data'}: dp-*.jsonl hold {noted:,} of the {there:,} samples that cursor.json gives the "
                f"steps {run.steps.start + 1:,} to {run.steps.stop:,}; restore these files"
            )
        return run

    @cached_property
    def steps(self) -> range:
        """The steps that all ranks have noted in full; the ranks may have read one more before they were stopped."""
        first = self.cursor.history[0].step
        whole = [step for step in self.noted if step >= first and self.noted[step].samples == self.size(step)]
        return range(first, max(whole, default=first - 1) + 1)

    @property
    def skipped(self) -> list[range]:
        """Which of these steps read nothing."""
        return self.cursor.skips(self.steps.start, self.steps.stop)

    @property
    def samples_noted(self) -> int:
        """How many samples of these steps were noted, those of one noted twice once."""
        return sum(min(noted.samples, self.size(step)) for step, noted in self.noted.items() if step in self.steps)

    def size(self, step: int) -> int:
        """The global batch size of a step."""
        return self.cursor.first_sample(step + 1) - self.cursor.first_sample(step)

    def indices(self, step: int) -> Int64:
        """[global batch size] the global samples of a step."""
        return np.arange(self.cursor.first_sample(step), self.cursor.first_sample(step + 1))


def _left_out(directory: Path, cursor: DataCursor, job: JobConfig) -> dict[str, Corpus]:
    """The training parts of corpora that data.blend names no more, as far as they still lie where they lay."""
    names, found = {corpus.label for corpus in job.data.blend}, {}
    for name, path in read_paths(directory).items():
        if name in cursor.corpora and name not in names:
            try:
                corpus, _ = split(open_corpus(path, job.model.vocab_size), job)
            except CorpusError as error:
                print(f"corpus {name}, which data.blend names no more: {error}", file=sys.stderr)
                continue
            if corpus.fingerprint == cursor.corpora[name]:
                found[name] = corpus
            else:
                print(f"corpus {name}, which data.blend names no more: {path} is not what was read", file=sys.stderr)
    return found


def _noted(directory: Path) -> dict[int, Noted]:
    """The notes by step. A line that a kill cut short is left out, as at a resume. Raises CorpusError."""
    found: dict[int, Noted] = {}
    for path in sorted(directory.glob("dp-*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                entry = json.loads(line)
                step, samples, digest = (index(entry[key]) for key in ("step", "samples", "digest"))
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(
                    f"{path}, line {number}: no record of a step ({error!r}); restore the file"
                ) from error
            before = found.get(step - 1, Noted(0, 0))
            found[step - 1] = Noted(before.samples + samples, (before.digest + digest) % WHOLE)
    return found
