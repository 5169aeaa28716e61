"""Megatron's indexed dataset, as Megatron-LM, Megatron-Core and GPT-NeoX write it: the format, and reading it.

    PREFIX.bin    the token ids of all documents, one after the other, little endian
    PREFIX.idx    "MMIDIDX\\0\\0", version 1 (u64), code of the token type (u8), n (u64), m + 1 (u64),
                  lengths [n] i32, pointers [n] i64 (bytes), documents [m + 1] i64 (first sequence of each)
    PREFIX.summary.json    ours, and may be missing: what was learned when the tokens were written

A document is one sequence or several; the n sequences follow one another in PREFIX.bin. Source:
megatron/core/datasets/indexed_dataset.py of Megatron-Core 0.16; megatron/data/indexed_dataset.py of GPT-NeoX lays the
same bytes under the name of MMapIndexedDataset. `launch.data.indexed_writer` writes it.

Shapes: n sequences, m documents.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.data.corpus import CorpusError, Int64, Shard, Tokens, beyond_vocabulary

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The format's codes of integers; 6 and 7 are floating point and hold no tokens."""

_BLOCK = 1 << 17
_BLOCKS = 128
"""What is read of each array when a corpus is opened: this many blocks of this many bytes, evenly spaced, so that
up to 16 MiB are read whole and a terabyte opens as fast."""


def token_type(vocab_size: int) -> np.dtype:
    """The narrower of the two types that Megatron's tools write, where it holds this many ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def beside(prefix: Path, suffix: str) -> Path:
    """PREFIX.suffix, whatever dots the prefix has."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def open_indexed(prefix: Path, vocab_size: int | None = None) -> Shard:
    """The documents at `prefix`, mapped. Reading checks every token id against `vocab_size`.

    Opening reads the header, both ends of each array and a sample: a token beyond the vocabulary, or sequences that do
    not follow one another, are found here where the sample or the summary shows them.

    Raises CorpusError: a file that is missing, cut short, longer than its index says, of another version or no such
    file; a token id beyond `vocab_size`.
    """
    index_file, token_file = beside(prefix, "idx"), beside(prefix, "bin")
    missing = [path.name for path in (index_file, token_file) if not path.is_file()]
    if missing:
        there = "neither is there" if len(missing) == 2 else "the other is there"
        raise CorpusError(
            f"{prefix}: {' and '.join(missing)} missing ({there}); a corpus is a .bin and an .idx, named without them: "
            f"{_remedy(prefix)}"
        )
    try:
        index, dtype, lengths, pointers, documents = _index(index_file)
        tokens = _tokens(token_file, index_file, dtype, lengths, pointers)
    except OSError as error:
        raise CorpusError(f"{prefix}: cannot be read ({error}); check the file system and its permissions") from error
    _check_order(index_file, lengths, pointers, documents, dtype.itemsize)
    digest, smallest, largest = _sample(tokens, pointers, documents)
    index.madvise(mmap.MADV_RANDOM)  # bisected from here on: reading ahead would only push out what is needed
    summary = read_summary(prefix)
    if summary is not None and summary["tokens"] == len(tokens):
        largest = max(largest, summary["largest_token"])
    if vocab_size is not None and (smallest < 0 or largest >= vocab_size):
        raise beyond_vocabulary(str(prefix), smallest if smallest < 0 else largest, vocab_size)
    return Shard(str(prefix), tokens, pointers, documents, digest, vocab_size)


def _index(path: Path) -> tuple[mmap.mmap, np.dtype, npt.NDArray[np.int32], Int64, Int64]:
    """The mapped file, token type, lengths [n], pointers [n] and documents [m + 1]."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
    if start[: len(MAGIC)] != MAGIC:
        raise CorpusError(
            f"{path}: begins with {start[:9]!r}, not with {MAGIC!r}: it is no index of Megatron's mapped format; "
            "write the corpus with launch/prepare_data.py, or with --dataset-impl mmap"
        )
    if len(start) < HEADER.size:
        raise CorpusError(f"{path}: cut short, {size} bytes where the header alone has {HEADER.size}; copy it again")
    _, version, code, sequences, entries = HEADER.unpack(start)
    if version != VERSION:
        raise CorpusError(
            f"{path}: an index of version {version}, this program reads version {VERSION}; write the corpus again"
        )
    if code not in TOKEN_TYPES:
        raise CorpusError(
            f"{path}: tokens of type code {code}, which is no integer type; readable are "
            f"{', '.join(f'{key} ({np.dtype(name).name})' for key, name in TOKEN_TYPES.items())}"
        )
    wanted = HEADER.size + 12 * sequences + 8 * entries
    if size != wanted:
        what = "its modes of several media are not read" if size == wanted + sequences else "copy it again"
        raise CorpusError(
            f"{path}: {size} bytes instead of {wanted} for {sequences} sequences and {entries - 1} documents; {what}"
        )
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    raw = np.frombuffer(mapped, dtype=np.uint8)
    at = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * entries]).tolist()
    lengths, pointers, documents = (raw[at[i] : at[i + 1]].view(dtype) for i, dtype in enumerate(("<i4", "<i8", "<i8")))
    if entries <= 1:  # some versions of the tools lost the documents when they merged files: one sequence each
        documents = np.arange(sequences + 1, dtype=np.int64)
    elif documents[0] != 0 or documents[-1] != sequences:
        raise CorpusError(
            f"{path}: its documents are sequences {documents[0]} to {documents[-1]}, but there are {sequences}; "
            "write the corpus again"
        )
    return mapped, np.dtype(TOKEN_TYPES[code]), lengths, pointers, documents


def _tokens(path: Path, index: Path, dtype: np.dtype, lengths: npt.NDArray[np.int32], pointers: Int64) -> Tokens:
    """[T] mapped, as long as the index says."""
    wanted, size = 0, path.stat().st_size
    if len(lengths):
        wanted = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if size != wanted:
        how = "cut short" if size < wanted else "longer than its index says"
        raise CorpusError(
            f"{path}: {how}, {size} bytes instead of the {wanted} of {index.name}; copy both again from where "
            "they were written"
        )
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) if size else np.zeros(0, dtype)


def _remedy(prefix: Path) -> str:
    """What to do where a corpus is not at `prefix`."""
    named_without = prefix.with_suffix("")
    if prefix.suffix in (".bin", ".idx") and all(beside(named_without, ending).is_file() for ending in ("bin", "idx")):
        return f"write {named_without}"
    remedy = "correct the path, or copy the file again"
    if prefix.is_file() or beside(prefix, "bin").is_file():
        remedy += "; docs/data.md says how a file of bare tokens becomes a corpus"
    return remedy


def _check_order(path: Path, lengths: npt.NDArray[np.int32], pointers: Int64, documents: Int64, itemsize: int) -> None:
    """Raises CorpusError where a sequence or document of the sample does not begin where the one before it ends."""
    if len(pointers) and pointers[0] != 0:
        raise CorpusError(f"{path}: the first sequence begins at byte {pointers[0]}, not 0; write the corpus again")
    for start, stop in _blocks(len(pointers), _BLOCK // 8):
        begins = np.array(pointers[start : stop + 1])
        ends = begins[: stop - start] + lengths[start:stop].astype(np.int64) * itemsize
        wrong = np.flatnonzero(ends[: len(begins) - 1] != begins[1:])
        if len(wrong):
            one = int(wrong[0])
            raise CorpusError(
                f"{path}: sequence {start + one + 1} begins at byte {begins[one + 1]}, but the one before it ends at "
                f"{ends[one]}; only sequences that follow one another are read: write the corpus again"
            )
    for start, stop in _blocks(len(documents), _BLOCK // 8):
        back = np.flatnonzero(np.diff(documents[start : stop + 1]) < 0)
        if len(back):
            one = start + int(back[0])
            raise CorpusError(
                f"{path}: document {one} begins at sequence {documents[one]}, but the next one at "
                f"{documents[one + 1]}; write the corpus again"
            )


def _sample(tokens: Tokens, pointers: Int64, documents: Int64) -> tuple[str, int, int]:
    """Digest of the arrays' sizes and samples, and smallest and largest token id of the sample (0, -1: none)."""
    digest = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)} {len(pointers)} {len(documents)}".encode())
    smallest, largest = 0, -1
    for array in (tokens, pointers, documents):
        for start, stop in _blocks(len(array), _BLOCK // array.itemsize):
            block = np.array(array[start:stop])
            digest.update(block.tobytes())
            if array is tokens:
                smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
    return digest.hexdigest(), smallest, largest


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at most _BLOCKS blocks of range(size): all of it where that is enough, the last included."""
    if size <= _BLOCKS * block:
        yield from ((start, min(start + block, size)) for start in range(0, size, block))
    else:
        starts = np.linspace(0, size - block, _BLOCKS).astype(np.int64)
        yield from ((start, start + block) for start in starts.tolist())


def fingerprint(tokens: Tokens, lengths: npt.ArrayLike) -> str:
    """What `open_indexed` would say of the same documents on disk, one sequence each."""
    shard = Shard.in_memory("", tokens, lengths, "")
    return _sample(shard.tokens, shard.pointers, shard.documents)[0]


def read_summary(prefix: Path) -> dict[str, Any] | None:
    """PREFIX.summary.json, or None where there is none. Raises CorpusError where it cannot be read."""
    path = beside(prefix, "summary.json")
    try:
        found = json.loads(path.read_text())
        return found | {key: int(found[key]) for key in ("tokens", "largest_token")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); delete it, the corpus is complete without") from error
