"""Texts to be tokenised, read in blocks of bounded size: plain text, JSON lines, Parquet, and gzip or zstd of these.

The blocks of a file follow from its content alone, and reading can start at any of them.
"""

from __future__ import annotations

import codecs
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

Kind = Literal["text", "jsonl", "parquet"]
BLOCK_BYTES = 1 << 18
"""Text of one block, before its last record is finished: a tenth of a second's work, so that no process idles long at
the end, and large beside what handing it over costs."""
PARQUET_ROWS = 1024
"""Read at a time, at most."""
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".zstd": b"\x28\xb5\x2f\xfd"}


DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)
"""What the libraries raise where a file is damaged."""


class BadInput(ValueError):
    """A file that cannot be read to its end; the message says where it breaks off."""


@dataclass(frozen=True)
class Start:
    """Where a block begins in its file."""

    position: int = 0
    """Bytes of text (decompressed), or rows of Parquet."""
    record: int = 0
    """Records before it."""


@dataclass(frozen=True)
class Block:
    """Whole records, or for plain text a part of the file's one document."""

    kind: Kind
    content: bytes | list[bytes | None]
    """Lines of JSON, a stretch of text, or the column of a Parquet file: said to be UTF-8, which nobody has checked."""
    start: Start
    following: Start
    first: bool = True
    """For plain text: whether the document begins here."""
    last: bool = True
    """For plain text: whether the document ends here."""
    read: int = 0
    """Bytes of the file on disk read so far, for a progress bar."""


def kind_of(path: Path) -> Kind:
    """The kind of a file by its name, however it is compressed: .jsonl .ndjson .json, .parquet, else plain text."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _KINDS.get(suffixes[-1], "text") if suffixes else "text"


def blocks(path: Path, field: str, start: Start | None = None) -> Iterator[Block]:
    """The blocks of a file, from the one at `start` on. `field` names the column of a Parquet file.

    Raises BadInput where the file is damaged (what came before has been given) or has no such column.
    """
    kind, begin = kind_of(path), start or Start()
    readers: dict[Kind, Callable[[IO[bytes], Start], Iterator[Block]]] = {
        "text": _text_blocks,
        "jsonl": _json_blocks,
        "parquet": lambda stream, begin: _parquet_blocks(stream, begin, field),
    }
    read = readers[kind]
    with _opened(path) as (raw, stream):
        if stream is not raw and kind == "parquet":  # read from its end: it needs a file that can be sought
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked)
                yield from read(unpacked, begin)
        else:
            for block in read(stream, begin):
                yield replace(block, read=raw.tell())


def check_text(path: Path) -> None:
    """Reads all of a plain text file. Raises BadInput where it is damaged, or no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with _opened(path) as (_, stream):
        while block := stream.read(BLOCK_BYTES):
            if (at := block.find(b"\0")) >= 0:
                raise BadInput(f"binary, not text (NUL at byte {position + at})")
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                raise BadInput(f"not UTF-8 text (near byte {position + error.start})") from error
            position += len(block)
        if decoder.getstate()[0]:
            raise BadInput("not UTF-8 text (ends inside a character)")


def _text_blocks(stream: IO[bytes], start: Start) -> Iterator[Block]:
    """Stretches that end with a line; a line too long for that is cut between two characters."""
    _skip(stream, start.position)
    at, content = start, _stretch(stream, b"")
    while content:
        end = len(content)
        if end >= 2 * BLOCK_BYTES and not content.endswith(b"\n"):
            begins = (i for i in range(end - 1, end - 5, -1) if content[i] & 0xC0 != 0x80)  # where a character does
            end = next(begins, end)  # none does in what is no text; that is told by who decodes it
        after = _stretch(stream, content[end:])
        following = Start(at.position + end, at.record + (not after))
        yield Block("text", content[:end], at, following, at.position == 0, not after)
        at, content = following, after


def _stretch(stream: IO[bytes], carry: bytes) -> bytes:
    content = carry + stream.read(BLOCK_BYTES - len(carry))
    return content + stream.readline(BLOCK_BYTES)


def _json_blocks(stream: IO[bytes], start: Start) -> Iterator[Block]:
    """Whole lines; of a file that breaks off, those that can be read."""
    _skip(stream, start.position)
    at, error = start, None
    while error is None:
        content = bytearray()
        try:
            while piece := stream.read1(min(1 << 16, BLOCK_BYTES - len(content))):  # type: ignore[attr-defined]
                content += piece
            if content and not content.endswith(b"\n"):
                content += stream.readline()
        except DAMAGE as found:
            error = found
            del content[content.rfind(b"\n") + 1 :]
        if content:
            records = content.count(b"\n") + (not content.endswith(b"\n"))
            following = Start(at.position + len(content), at.record + records)
            yield Block("jsonl", bytes(content), at, following)
            at = following
        elif error is None:
            return
    raise error


def _skip(stream: IO[bytes], count: int) -> None:
    """Forward by `count` bytes."""
    while count > 0:
        got = len(stream.read(min(count, BLOCK_BYTES)))
        if not got:
            raise BadInput(f"ends {count} bytes before the place where reading was to go on")
        count -= got


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file as it lies on the disk, and what it holds, decompressed. Raises BadInput where that is damaged."""
    try:
        with open(path, "rb") as raw, _decompressed(raw, path) as stream:
            yield raw, stream
    except DAMAGE as error:
        raise BadInput(f"{type(error).__name__}: {error}") from error


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    """The text of a file, by its name; checked against its first bytes."""
    expected = _COMPRESSED.get(path.suffix)
    if expected is None:
        return raw
    magic = raw.read(4)
    raw.seek(0)
    if not magic.startswith(expected):
        raise BadInput(f"named {path.suffix}, but begins with {magic!r}, not {expected!r}")
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    return io.BufferedReader(_ZstdFrames(raw), 1 << 20)


class _ZstdFrames(io.RawIOBase):
    """The content of zstd frames; unlike the library's reader it tells a file that breaks off from a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._ready = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._frame.unused_data or self._raw.read(1 << 18)
            if not compressed and not self._frame.eof:
                raise EOFError("the file ends inside a zstd frame")
            if not compressed:
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(compressed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _parquet_blocks(stream: IO[bytes], start: Start, field: str) -> Iterator[Block]:
    file = pq.ParquetFile(stream)
    schema = file.schema_arrow
    if field not in schema.names:
        raise BadInput(f"has no column {field!r}; its columns are {', '.join(schema.names)}")
    column = schema.field(field).type
    if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
        raise BadInput(f"column {field!r} holds {column}, not text")
    row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row + count <= start.position:
            row += count
            continue
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
            for texts in _parts(batch.column(0)):
                at, row = Start(row, row), row + len(texts)
                if row > start.position:
                    yield Block("parquet", texts.cast(pa.large_binary()).to_pylist(), at, Start(row, row))


def _parts(texts: pa.Array) -> Iterator[pa.Array]:
    """Runs of the texts: each begins with the first text that lies beyond another BLOCK_BYTES of them."""
    ends = np.cumsum(pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False), dtype=np.int64)
    blocks = np.concatenate([[0], ends[:-1]]) // BLOCK_BYTES
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(texts)]
    for first, end in pairwise(edges):
        yield texts.slice(first, end - first)
