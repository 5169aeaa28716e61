"""Section `data`, and the rules that are about it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from launch.data.encoders import BYTES
from launch.sections.base import ListOf, Section
from launch.settings.rules import Job, idle, rule
from launch.user_path import UserPath


class BlendedCorpus(Section):
    """One corpus of the blend."""

    path: UserPath
    """Path of its .bin and .idx without either ending, relative to the working directory; a glob joins several shards
    in the order of their names."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the sequences, relative to the other weights; 0 reads nothing. It may change when a run is resumed."""
    name: str | None = Field(default=None, min_length=1)
    """Name in checkpoints and in the audit; null takes the last part of the path."""

    @property
    def label(self) -> str:
        """The name, given or taken from the path."""
        return self.name or Path(self.path).name


class DataSection(Section):
    """The corpus and how it becomes tokens (docs/data.md)."""

    source: Literal["python_stdlib", "files", "indexed"]
    """python_stdlib: the running interpreter's own library. files: the texts that data.files names. indexed: the token
    files of data.blend."""
    files: ListOf[UserPath] = ()
    """Glob patterns of the text files, relative to the working directory; only with source: files."""
    blend: ListOf[BlendedCorpus] = ()
    """Corpora in Megatron's indexed format, with weights; only with source: indexed."""
    tokenizer: UserPath = BYTES
    """bytes, or the path of a Hugging Face tokenizer.json. With source: indexed it serves prompts and samples only."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of each corpus held out for evaluation; whole documents go to one side or the other."""
    validation_paths: ListOf[UserPath] = ()
    """Separate corpora for evaluation, written like the path of a blend. Nothing is held out then. Only with source:
    indexed."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents fill sequences. split: one after the other, cut where a sequence ends. best_fit: rearranged among
    64 sequences at a time, so that few are cut. Neither pads."""
    document_mask: bool = False
    """If several documents are packed in one sequence, a token sees only its own."""
    cache_directory: UserPath | None = None
    """Where token files of texts are kept between runs; null: ~/.cache/ringzero."""


@rule("data.files", "data.source")
def _source_has_its_files(job: Job) -> None:
    if job.data.source == "files" and not job.data.files:
        raise ValueError("files is empty but source is files; give glob patterns, such as [data/*.txt]")
    if job.data.source != "files" and job.data.files:
        raise ValueError(
            f"files is given but source ({job.data.source}) does not read it; remove files or set source: files"
        )


@rule("data.blend", "data.source")
def _source_has_its_blend(job: Job) -> None:
    source, blend = job.data.source, job.data.blend
    if source == "indexed" and not blend:
        raise ValueError("blend is empty but source is indexed; list corpora, such as [{path: data/web, weight: 1}]")
    if source != "indexed" and blend:
        raise ValueError(f"blend is given but source ({source}) does not read it; remove it or set source: indexed")
    if blend and not any(corpus.weight for corpus in blend):
        raise ValueError(f"all {len(blend)} weights are 0, so nothing would be read; give one a weight > 0")


@rule("data.blend")
def _corpora_have_names_of_their_own(job: Job) -> None:
    labels = [corpus.label for corpus in job.data.blend]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"{len(labels)} corpora have {len(set(labels))} names: {', '.join(twice)} comes twice, and a checkpoint "
            "tells corpora apart by name; add name: to one"
        )


@rule("data.validation_paths", "data.source")
def _validation_paths_are_indexed(job: Job) -> None:
    if job.data.validation_paths and job.data.source != "indexed":
        raise ValueError(
            f"validation_paths is given but source ({job.data.source}) does not read it; remove it, and data."
            "validation_fraction holds a part out, or set source: indexed"
        )


@idle("data.validation_fraction")
def _nothing_is_held_out(job: Job) -> str | None:
    paths = job.data.validation_paths
    if paths:
        return f"validation_paths ({', '.join(paths)}) are read instead; leave one of them out"
    return None


@idle("data.cache_directory")
def _no_text_becomes_tokens(job: Job) -> str | None:
    source = job.data.source
    if source == "indexed":
        return f"source ({source}) reads tokens where they lie; leave it out"
    return None
