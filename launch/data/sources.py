"""From texts to a corpus when a run starts: which files, in memory or cached."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal

import numpy as np

from launch.data.corpus import Corpus, CorpusError, Shard, Tokens
from launch.data.encoders import BYTES, ByteEncoder, Encoder, encoder_of
from launch.data.indexed import fingerprint
from launch.data.token_cache import cached_shard
from launch.plurals import counted

log = logging.getLogger(__name__)

IN_MEMORY_BYTES = 256 << 20
"""Byte corpora up to this size are read into each process: there is nothing to tokenise and little to share."""
READ_BYTES = 16 << 20
"""Text read before it is tokenised in one parallel batch."""
CACHE_VERSION = 2
CONTAINERS = (".jsonl", ".ndjson", ".parquet", ".gz", ".zst", ".zstd")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

TextSource = Literal["python_stdlib", "files"]


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus as it lies on disk."""

    path: Path
    label: str
    """What identifies it in the cache's key and fixes the order."""
    size: int
    mtime_ns: int


def load_text(
    *,
    source: TextSource,
    files: Sequence[str] = (),
    tokenizer: str = BYTES,
    vocab_size: int,
    cache_directory: Path | None = None,
) -> Corpus:
    """The whole corpus, one document per non-empty file, in the order of their paths.

    source: `python_stdlib`, the running interpreter's own library (tests and installed packages excluded), or `files`,
    globs relative to the working directory (`**` recurses). tokenizer: `bytes` (token = byte) or the path of a
    tokenizer.json, whose own post-processor decides on special tokens at a document's ends; nothing else is put between
    documents. Tokenised text, and bytes beyond IN_MEMORY_BYTES, are kept in cache_directory (default
    ~/.cache/ringzero), keyed by the tokenizer and the files' paths, sizes and times.

    Raises CorpusError: a glob without a file, an empty corpus, a file that is no UTF-8 text under a tokenizer, a token
    id beyond vocab_size, an unreadable file, tokenizer or cache.
    """
    found = _standard_library() if source == "python_stdlib" else _matching_files(files)
    encoder = encoder_of(tokenizer)
    documents = _documents(found, encoder)
    total_bytes = sum(file.size for file in found)
    if isinstance(encoder, ByteEncoder) and total_bytes <= IN_MEMORY_BYTES:
        shard, largest = _in_memory(documents, encoder.dtype)
    else:
        directory = cache_directory or Path.home() / ".cache" / "ringzero"
        shard, largest = _through_cache(directory, found, encoder, documents)
    if not len(shard.tokens):
        raise CorpusError(
            f"the corpus is empty: {counted(len(found), 'file')}, 0 tokens; point data.files at files with text"
        )
    if largest >= vocab_size:
        enough = max(largest + 1, encoder.vocab_size)
        raise CorpusError(
            f"the corpus holds token id {largest} (data.tokenizer: {tokenizer}), beyond "
            f"model.vocab_size ({vocab_size}); set model.vocab_size to at least {enough}"
        )
    return Corpus.of_shards("text", [shard])


def _in_memory(documents: Iterator[Tokens], dtype: np.dtype) -> tuple[Shard, int]:
    """All documents, and their largest token id."""
    parts = list(documents)
    tokens = np.concatenate([np.zeros(0, dtype), *parts])
    lengths = [len(part) for part in parts]
    return Shard.in_memory("text", tokens, lengths, fingerprint(tokens, lengths)), int(tokens.max(initial=0))


def _standard_library() -> list[TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise CorpusError(f"no *.py file in the interpreter's library {root}; use data.source: files")
    return sorted((_stat(path, path.relative_to(root).as_posix()) for path in paths), key=lambda file: file.label)


def _matching_files(patterns: Sequence[str]) -> list[TextFile]:
    paths = {os.path.abspath(path) for pattern in patterns for path in plain_texts(pattern)}
    return [_stat(Path(path), path) for path in sorted(paths)]


def plain_texts(pattern: str) -> list[str]:
    """The files of one pattern of data.files. Raises CorpusError where one is a container of texts by its name: its
    bytes would be trained on as they are."""
    found = matching_files(pattern, "data.files")
    for path in found:
        if path.endswith(CONTAINERS):
            raise CorpusError(
                f"data.files: {path} is no plain text, and each file is read as one text; take it with "
                "launch/prepare_data.py and source: indexed, or leave it out of the glob"
            )
    return found


def matching_files(pattern: str, key: str) -> list[str]:
    """The file of that name, brackets and all, else those that the glob gives (`**` recurses), by name.

    `key` is where errors say that the pattern stands. Raises CorpusError where there is no file.
    """
    if os.path.isfile(pattern):
        return [pattern]
    found = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if found:
        return found
    if os.path.isdir(pattern):
        every = os.path.join(pattern, "**", "*.txt")
        raise CorpusError(f"{key}: {pattern!r} is a folder; name the files in it, such as {every!r}")
    raise CorpusError(f"{key}: no file matches {pattern!r} (looked from {os.getcwd()}); correct the glob")


def _stat(path: Path, label: str) -> TextFile:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return TextFile(path, label, status.st_size, status.st_mtime_ns)


def _documents(files: Sequence[TextFile], encoder: Encoder) -> Iterator[Tokens]:
    """Token arrays, one per file, at most about READ_BYTES of text (or one file) at a time."""
    sizes = accumulate(file.size for file in files)
    for _, group in groupby(zip(files, sizes, strict=True), key=lambda pair: pair[1] // READ_BYTES):
        paths = [file.path for file, _ in group]
        yield from encoder.encode(paths, [_read(path) for path in paths])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(f"{path}: cannot be read ({error.strerror}); leave it out of the corpus")


def _through_cache(
    directory: Path, files: Sequence[TextFile], encoder: Encoder, documents: Iterator[Tokens]
) -> tuple[Shard, int]:
    settings = [CACHE_VERSION, encoder.identity, [(file.label, file.size, file.mtime_ns) for file in files]]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def told() -> Iterator[Tokens]:
        megabytes = sum(file.size for file in files) / 1e6
        log.info("tokenising %d files (%.1f MB) into %s", len(files), megabytes, directory / key)
        yield from documents

    try:
        return cached_shard(directory, key, encoder.dtype, told())
    except OSError as error:
        raise CorpusError(
            f"the token cache {directory} cannot be used ({error}); set data.cache_directory to a folder with room"
        ) from error
