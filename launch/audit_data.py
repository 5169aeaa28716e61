"""Proves from a run's records which documents each step saw, that none was repeated or lost, and that steps which were
to be skipped read nothing.

    python launch/audit_data.py RUN                 the whole run
    python launch/audit_data.py RUN --quick         without reading the tokens again
    python launch/audit_data.py RUN --show STEP     the documents of one step (counted from 1, as in metrics.jsonl)

It compares what the ranks noted while they trained (RUN/data/dp-*.jsonl), what the data cursor says they should have
read (RUN/data/cursor.json), and the corpora: those that RUN/config.yaml names, and those that the run has left out
since, whose paths RUN/data/corpora.json has. Paths are relative to the working directory, as in training. Exit status:
0 nothing repeated or lost, 1 something was, 2 the records or corpora cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from launch.data.batches import SequenceSampler
from launch.data.corpus import Corpus, CorpusError, Int64
from launch.data.cursor import BlendedSamples
from launch.data.data_log import total_digest
from launch.data.run_record import Noted, RunRecord
from launch.data.skipped import in_words
from launch.plurals import counted
from launch.standard_output import output_matters
from launch.user_path import user_path

_SAMPLES = 1 << 16
"""Drawn at a time, which bounds the memory."""
_MOST_FAULTS = 20


def faults_of_steps(run: RunRecord, *, quick: bool) -> Iterator[str]:
    """Steps that were lost or read twice, or whose ranks read something else than the cursor says."""
    known, source = set(run.samplers), BlendedSamples(run.samplers, run.cursor)
    for step in tqdm(run.steps, unit="step", disable=None):
        noted, size = run.noted.get(step, Noted(0, 0)), run.size(step)
        if run.cursor.skips(step, step + 1):
            if noted.samples:
                yield f"step {step + 1}: to be skipped, but the ranks noted {counted(noted.samples, 'sample')}"
            continue
        if noted.samples != size:
            how = "lost" if noted.samples < size else "repeated"
            found = counted(noted.samples, "sample")
            yield f"step {step + 1}: the ranks noted {found} instead of {size}: some were {how}"
            continue
        indices = run.indices(step)
        if quick or not known.issuperset(run.cursor.draws(indices)):
            continue
        digest = total_digest(indices.tolist(), source.samples(indices))
        if digest != noted.digest:
            found = f"digest {noted.digest}, here {digest}"
            yield f"step {step + 1}: the ranks read other tokens than the corpora hold ({found})"


def skipped_samples(run: RunRecord) -> dict[str, Int64]:
    """Which of each corpus's own samples belong to steps that were skipped."""
    found: dict[str, Int64] = {}
    for steps in run.skipped:
        samples = np.arange(run.cursor.first_sample(steps.start), run.cursor.first_sample(steps.stop))
        for name, (_, numbers) in run.cursor.draws(samples).items():
            found[name] = np.append(found.get(name, numbers[:0]), numbers)
    return found


def draws(run: RunRecord) -> tuple[dict[str, int], list[str]]:
    """How many samples of each corpus the history of the blend gives, and those that it gives twice or never."""
    drawn: dict[str, int] = {}
    faults = []
    end = run.cursor.first_sample(run.steps.stop)
    for start in range(0, end, _SAMPLES):
        for name, (_, numbers) in run.cursor.draws(np.arange(start, min(start + _SAMPLES, end))).items():
            before = drawn.get(name, 0)
            drawn[name] = before + len(numbers)
            if not (np.sort(numbers) == np.arange(before, drawn[name])).all():
                faults.append(f"corpus {name}: samples {numbers.min()} to {numbers.max()} follow sample {before - 1}")
    return drawn, faults


def faults_of_epochs(name: str, sampler: SequenceSampler, drawn: int) -> Iterator[str]:
    """Tokens that an epoch of a corpus gives twice, or a whole epoch never."""
    for epoch, first in enumerate(range(0, drawn, sampler.num_windows)):
        last = min(first + sampler.num_windows, drawn)
        start, stop = stretches(sampler, np.arange(first, last))
        if twice := int((start[1:] < stop[:-1]).sum()):
            yield f"corpus {name}, epoch {epoch + 1}: {counted(twice, 'stretch', 'stretches')} of tokens repeated"
        lost = len(sampler.corpus) - int((stop - start).sum())
        if last - first == sampler.num_windows and (lost or twice):
            yield f"corpus {name}, epoch {epoch + 1}: {counted(lost, 'token')} lost"


def stretches(sampler: SequenceSampler, samples: Int64) -> tuple[Int64, Int64]:
    """Where the stretches of these of the corpus's samples begin and end, both [stretches], ascending."""
    windows = sampler.windows(samples).tolist()
    found = np.array([stretch for window in windows for stretch in sampler.stretches(window)], dtype=np.int64)
    found = found.reshape(-1, 2)
    return tuple(found[np.argsort(found[:, 0])].T)


def documents_seen(corpus: Corpus, start: Int64, stop: Int64) -> tuple[int, int]:
    """(seen whole, seen in part): documents of a corpus under ascending stretches that do not overlap."""
    edges = np.concatenate([[0], corpus.document_starts(0, len(corpus)), [len(corpus)]])
    apart = np.concatenate([[True], start[1:] != stop[:-1]])
    begins, ends = start[apart], stop[np.append(np.flatnonzero(apart)[1:] - 1, len(stop) - 1)]
    whole = np.searchsorted(edges, ends, "right") - np.searchsorted(edges, begins, "left") - 1
    first, last = np.searchsorted(edges, begins, "right") - 1, np.searchsorted(edges, ends, "left") - 1
    touched = int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())
    complete = int(whole.clip(min=0).sum())
    return complete, touched - complete


def audit(run: RunRecord, *, quick: bool = False) -> list[str]:
    """Prints what was read; returns the faults."""
    drawn, faults = draws(run)
    faults = [*faults_of_steps(run, quick=quick), *faults]
    skipped = skipped_samples(run)
    end, left_out = run.cursor.first_sample(run.steps.stop), sum(map(len, skipped.values()))
    print(f"steps {run.steps.start + 1} to {run.steps.stop}: {_samples(end, left_out)}")
    for segment in run.cursor.history:
        blend = ", ".join(f"{name} {weight:g}" for name, weight in segment.weights.items())
        print(f"  from step {segment.step + 1}: {segment.global_batch_size} a step; {blend}")
    if skipped:
        print(f"  skipped: {in_words(run.skipped)}")
    for name, count in drawn.items():
        sampler, unread = run.samplers.get(name), skipped.get(name, np.empty(0, np.int64))
        line = f"corpus {name}: {_samples(count, len(unread))}"
        if sampler is None:
            print(f"{line}; left out of data.blend, and not where it was: only counted")
            continue
        faults += faults_of_epochs(name, sampler, count)
        epochs, rest = divmod(count, sampler.num_windows)
        documents = counted(sampler.corpus.num_documents, "document")
        line += f", {counted(epochs, 'epoch')} of {documents}"
        read = np.setdiff1d(np.arange(count - rest, count), unread)
        if len(read):
            whole, part = documents_seen(sampler.corpus, *stretches(sampler, read))
            line += f"; of the next epoch {counted(whole, 'document')} whole and {part:,} in part"
        print(line)
    return faults


def _samples(count: int, skipped: int) -> str:
    return counted(count, "sample") + (f", {skipped:,} of them skipped" if skipped else "")


def show(run: RunRecord, step: int) -> None:
    """Prints the documents of a step, counted from 0."""
    if run.cursor.skips(step, step + 1):
        print(f"step {step + 1} was skipped: no rank read this")
    first = run.cursor.first_sample(step)
    draws = run.cursor.draws(run.indices(step)).items()
    rows = [(at, name, number) for name, pair in draws for at, number in np.transpose(pair).tolist()]
    for at, name, number in sorted(rows):
        print(f"sample {first + at}: corpus {name}, its sample {number}")
        sampler = run.samplers.get(name)
        if sampler is None:
            continue
        for start, stop in sampler.stretches(int(sampler.windows(np.array([number]))[0])):
            for shard, head, tail in sampler.corpus.documents(start, stop):
                which = f"document {head}" if head == tail else f"documents {head} to {tail}"
                print(f"    {shard}: {which} (tokens {start} to {stop - 1} of the training part)")


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, metavar="RUN")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--show", type=int, metavar="STEP")
    options = parser.parse_args(arguments)
    try:
        run = RunRecord.read(options.run)
        if options.show is not None:
            if options.show - 1 not in run.steps:
                known = f"{run.steps.start + 1} to {run.steps.stop}"
                raise CorpusError(f"--show {options.show}: the run's records hold steps {known}; name one of them")
            show(run, options.show - 1)
            return 0
        faults = audit(run, quick=options.quick)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in faults[:_MOST_FAULTS]:
        print(f"FAULT: {fault}")
    if len(faults) > _MOST_FAULTS:
        print(f"... and {len(faults) - _MOST_FAULTS} more")
    if not faults:
        by = ", by the records alone" if options.quick else ""
        but = " but the steps skipped" if run.skipped else ""
        print(f"nothing was repeated within an epoch, and nothing was lost{but}{by}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
