"""From texts to a corpus: which files, which tokenizer, in memory or cached."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from launch.corpus import Corpus, CorpusError, Shard, Tokens
from launch.indexed import fingerprint, token_type
from launch.token_cache import cached_shard

log = logging.getLogger(__name__)

IN_MEMORY_BYTES = 256 << 20
"""Byte corpora up to this size are read into each process: there is nothing to tokenise and little to
share."""
READ_BYTES = 16 << 20
"""Text read before it is tokenised in one parallel batch."""
CACHE_VERSION = 2
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

TextSource = Literal["python_stdlib", "files"]


@dataclass(frozen=True)
class TextFile:
    path: Path
    label: str
    """What identifies it in the cache's key and fixes the order."""
    size: int
    mtime_ns: int


def load_text(
    *,
    source: TextSource,
    files: Sequence[str] = (),
    tokenizer: str = "bytes",
    vocab_size: int,
    cache_directory: Path | None = None,
) -> Corpus:
    """The whole corpus, one document per non-empty file, in the order of their paths.

    source: `python_stdlib`, the running interpreter's own library (tests and installed packages excluded), or
    `files`, globs relative to the working directory (`**` recurses). tokenizer: `bytes` (token = byte) or the
    path of a tokenizer.json, whose own post-processor decides on special tokens at a document's ends; nothing
    else is put between documents. Tokenised text, and bytes beyond IN_MEMORY_BYTES, are kept in
    cache_directory (default ~/.cache/ringzero), keyed by the tokenizer and the files' paths, sizes and times.

    Raises CorpusError: a glob without a file, an empty corpus, a file that is no UTF-8 text under a
    tokenizer, a token id beyond vocab_size, an unreadable file, tokenizer or cache.
    """
    found = _standard_library() if source == "python_stdlib" else _matching_files(files)
    encoder: Encoder = ByteEncoder() if tokenizer == "bytes" else TokenizerEncoder(tokenizer)
    documents = _documents(found, encoder)
    total_bytes = sum(file.size for file in found)
    if isinstance(encoder, ByteEncoder) and total_bytes <= IN_MEMORY_BYTES:
        shard, largest = _in_memory(documents, encoder.dtype)
    else:
        directory = cache_directory or Path.home() / ".cache" / "ringzero"
        shard, largest = _through_cache(directory, found, encoder, documents)
    if not len(shard.tokens):
        raise CorpusError(f"the corpus is empty: {len(found)} files, 0 tokens; point data.files at files with text")
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
    if not patterns:
        raise CorpusError(
            "data.source is files, but data.files is empty; list one glob or more, as in ['text/**/*.txt']"
        )
    paths: set[str] = set()
    for pattern in patterns:
        matches = [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
        if not matches:
            raise CorpusError(f"data.files: no file matches {pattern!r} (looked from {os.getcwd()}); correct the glob")
        paths.update(os.path.abspath(path) for path in matches)
    return [_stat(Path(path), path) for path in sorted(paths)]


def _stat(path: Path, label: str) -> TextFile:
    try:
        status = path.stat()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); leave it out of the corpus") from error
    return TextFile(path, label, status.st_size, status.st_mtime_ns)


class Encoder(Protocol):
    dtype: np.dtype
    vocab_size: int
    identity: str
    """Changes whenever the tokens of a text would."""

    def encode(self, paths: Sequence[Path], contents: Sequence[bytes]) -> list[Tokens]: ...


class ByteEncoder:
    """Token = byte; any file will do."""

    dtype: np.dtype = np.dtype("u1")
    vocab_size = 256
    identity = "bytes"

    def encode(self, paths: Sequence[Path], contents: Sequence[bytes]) -> list[Tokens]:
        return [np.frombuffer(content, dtype=np.uint8) for content in contents]


class TokenizerEncoder:
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: str) -> None:
        try:
            content = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(
                f"data.tokenizer: {path!r} cannot be read ({error}); give `bytes` or the path of a tokenizer.json"
            ) from error
        try:
            self._tokenizer: Any = Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise CorpusError(f"data.tokenizer: {path!r} is no tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = int(self._tokenizer.get_vocab_size())
        self.dtype: np.dtype = token_type(self.vocab_size)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, paths: Sequence[Path], contents: Sequence[bytes]) -> list[Tokens]:
        texts = [_decode(path, content) for path, content in zip(paths, contents, strict=True)]
        return [np.array(ids, dtype=self.dtype) for ids in self.ids(texts)]

    def ids(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of each text; `special` with what the tokenizer's own post-processor puts at a text's ends."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    @property
    def at_the_ends(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        [full], [bare] = self.ids(["a"]), self.ids(["a"], special=False)
        before = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
        return full[:before], full[before + len(bare) :]

    def token_id(self, token: str) -> int:
        """Raises CorpusError where the tokenizer has no such token."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CorpusError(f"{token!r} is none of the tokenizer's {self.vocab_size} tokens; name one that it has")
        return int(found)


def _decode(path: Path, content: bytes) -> str:
    remedy = "leave it out of data.files, or use data.tokenizer: bytes"
    if (position := content.find(b"\0")) >= 0:
        raise CorpusError(f"{path}: binary, not text (NUL at byte {position}); {remedy}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text (at byte {error.start}); {remedy}") from error


def _documents(files: Sequence[TextFile], encoder: Encoder) -> Iterator[Tokens]:
    """Token arrays, one per file, at most about READ_BYTES of text (or one file) at a time."""
    group: list[TextFile] = []
    size = 0
    for position, file in enumerate(files):
        group.append(file)
        size += file.size
        if size >= READ_BYTES or position == len(files) - 1:
            paths = [one.path for one in group]
            yield from encoder.encode(paths, [_read(path) for path in paths])
            group, size = [], 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); leave it out of the corpus") from error


def _through_cache(
    directory: Path, files: Sequence[TextFile], encoder: Encoder, documents: Iterator[Tokens]
) -> tuple[Shard, int]:
    settings = [CACHE_VERSION, encoder.identity, [(file.label, file.size, file.mtime_ns) for file in files]]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def build() -> Iterator[Tokens]:
        log.info(
            "tokenising %d files (%.1f MB) into %s",
            len(files),
            sum(f.size for f in files) / 1e6,
            directory / key,
        )
        return documents

    try:
        return cached_shard(directory, key, encoder.dtype, build)
    except OSError as error:
        raise CorpusError(
            f"the token cache {directory} cannot be used ({error}); set data.cache_directory to a folder with room"
        ) from error
