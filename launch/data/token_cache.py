"""Tokenised texts on disk: one process of a node writes them, all memory-map them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from launch.atomic_files import completed_folder
from launch.data.corpus import CorpusError, Shard, Tokens
from launch.data.indexed import open_indexed, read_summary
from launch.data.indexed_writer import IndexedWriter


def cached_shard(directory: Path, key: str, dtype: np.dtype, documents: Iterable[Tokens]) -> tuple[Shard, int]:
    """The documents kept under directory/key, and their largest token id. Only the first process to come takes any of
    `documents`, to build them from.

    Every process of the node calls this. One takes the lock and builds; the others wait in the kernel until it is done
    or dead, so a killed builder leaves nobody hanging. The finished folder appears by a rename, hence complete or not
    at all. Errors: OSError when the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entry = directory / key
    if not entry.exists():
        with open(directory / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not entry.exists():
                _build(entry, dtype, documents)
    try:
        summary = read_summary(entry / "tokens")
        if summary is None:
            raise CorpusError("tokens.summary.json is missing")
        return open_indexed(entry / "tokens"), summary["largest_token"]
    except CorpusError as error:
        raise CorpusError(f"the token cache {entry} is damaged ({error}); delete that folder") from error


def _build(entry: Path, dtype: np.dtype, documents: Iterable[Tokens]) -> None:
    with completed_folder(entry) as partial, closing(IndexedWriter(partial / "tokens", dtype)) as writer:
        for document in documents:
            writer.write(document, np.array([len(document)], dtype=np.int64))
        writer.finish()
