"""What of a job's data this machine sees: for a login node, before the job is queued."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from launch.config import JobConfig
from launch.data.corpora import describe, fresh_cursor, load_corpora, open_corpus, prefixes_of
from launch.data.corpus import CorpusError
from launch.data.encoders import BYTES, encoder_of
from launch.data.indexed import read_summary
from launch.data.sources import plain_texts
from launch.plurals import counted


def inspect_data(job: JobConfig) -> tuple[list[str], list[str]]:
    """(what is there, faults), in lines. Opens corpora and tokenises nothing.

    The faults may be this machine's alone, because the nodes of a cluster may see other disks.
    """
    faults = [*_faults(job), *other_tokenizers(job)]
    if faults or job.data.source == "python_stdlib":
        return [], faults
    if job.data.source == "files":
        files = {file for pattern in job.data.files for file in plain_texts(pattern)}
        size = sum(Path(file).stat().st_size for file in files)
        return [f"{counted(len(files), 'text')}, {size / 1e6:,.1f} MB"], []
    try:
        corpora = load_corpora(job)
    except CorpusError as error:
        return [], [str(error)]
    return describe(corpora, job, fresh_cursor(corpora, job), 0), []


def other_tokenizers(job: JobConfig) -> list[str]:
    """A line for each corpus of the blend that launch/prepare_data.py made with another tokenizer than the job's."""
    try:
        identity = encoder_of(job.data.tokenizer).identity
        summaries = {
            corpus.label: [read_summary(prefix) for prefix in prefixes_of(corpus.path, "data.blend")]
            for corpus in job.data.blend
        }
    except CorpusError:  # told where it matters: the job may not need that file
        return []
    return [
        f"corpus {label} was tokenised by another tokenizer than data.tokenizer ({job.data.tokenizer}), which reads "
        "prompts and writes samples; name that one"
        for label, found in summaries.items()
        if any(summary and summary.get("tokenizer", identity) != identity for summary in found)
    ]


def _faults(job: JobConfig) -> list[str]:
    data, vocabulary = job.data, job.model.vocab_size
    attempts: list[Callable[[], object]] = [partial(plain_texts, pattern) for pattern in data.files]
    attempts += [partial(open_corpus, corpus.path, vocabulary) for corpus in data.blend]
    attempts += [partial(open_corpus, path, vocabulary, key="data.validation_paths") for path in data.validation_paths]
    attempts.append(partial(_check_tokenizer, data.tokenizer, vocabulary))
    faults = []
    for attempt in attempts:
        try:
            attempt()
        except CorpusError as error:
            faults.append(str(error))
    return faults


def _check_tokenizer(name: str, vocabulary: int) -> None:
    encoder = encoder_of(name)
    if name != BYTES and encoder.vocab_size > vocabulary:
        raise CorpusError(
            f"data.tokenizer ({name}) has {encoder.vocab_size:,} tokens, more than model.vocab_size ({vocabulary:,}); "
            f"set model.vocab_size to at least {encoder.vocab_size}, or give the tokenizer of this model"
        )
