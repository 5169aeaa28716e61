"""Tokenised corpora on disk: written once by one process of a node, memory-mapped by all of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from launch.corpus import Corpus, CorpusError, Int64, Tokens


@dataclass(frozen=True)
class Summary:
    """What the pass over the documents learned."""

    dtype: str
    tokens: int
    largest_token: int
    fingerprint: str


def write_documents(documents: Iterable[Tokens], dtype: np.dtype, file: BinaryIO) -> tuple[Int64, Summary]:
    """Append the documents' tokens to `file`; returns their lengths [D] and the summary."""
    lengths: list[int] = []
    largest = -1
    digest = hashlib.sha256(dtype.str.encode())
    for document in documents:
        raw = np.ascontiguousarray(document, dtype=dtype).tobytes()
        file.write(raw)
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
        lengths.append(len(document))
        if len(document):
            largest = max(largest, int(document.max()))
    return np.array(lengths, np.int64), Summary(dtype.str, sum(lengths), largest, digest.hexdigest())


def cached_corpus(
    directory: Path, key: str, dtype: np.dtype, documents: Callable[[], Iterable[Tokens]]
) -> tuple[Corpus, Summary]:
    """The corpus kept under directory/key, built from `documents()` by the first process to come.

    Every process of the node calls this. One takes the lock and builds; the others wait in the kernel until
    it is done or dead, so a killed builder leaves nobody hanging. The finished folder appears by a rename,
    hence complete or not at all. Tokens lie flat, as in Megatron's .bin. Errors: OSError when the folder
    cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entry = directory / key
    if not entry.exists():
        with open(directory / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.exists():
                _build(entry, dtype, documents())
    return _open(entry)


def _open(entry: Path) -> tuple[Corpus, Summary]:
    file = entry / "tokens.bin"
    try:
        summary = Summary(**json.loads((entry / "summary.json").read_text()))
        lengths = np.load(entry / "lengths.npy")
        wanted, size = summary.tokens * np.dtype(summary.dtype).itemsize, file.stat().st_size
        if size != wanted:
            raise ValueError(f"{file} has {size} bytes, not {wanted}")
    except (ValueError, TypeError, EOFError, FileNotFoundError) as error:
        raise CorpusError(f"the token cache {entry} is damaged ({error}); delete that folder") from error
    tokens: Tokens = np.memmap(file, dtype=summary.dtype, mode="r") if summary.tokens else np.zeros(0, summary.dtype)
    return Corpus.from_documents("text", tokens, lengths, summary.fingerprint), summary


def _build(entry: Path, dtype: np.dtype, documents: Iterable[Tokens]) -> None:
    partial = entry.with_name(entry.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed builder left
    partial.mkdir()
    try:
        with open(partial / "tokens.bin", "wb") as file:
            lengths, summary = write_documents(documents, dtype, file)
            file.flush()
            os.fsync(file.fileno())
        np.save(partial / "lengths.npy", lengths)
        (partial / "summary.json").write_text(json.dumps(asdict(summary)))
        os.rename(partial, entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
