"""Writes Megatron's indexed dataset (format: `launch.data.indexed`) in bounded memory, so that a kill loses little."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from launch.data.corpus import Int64, Tokens
from launch.data.indexed import HEADER, MAGIC, TOKEN_TYPES, VERSION, beside

LONGEST_SEQUENCE = (1 << 31) - 1
"""Tokens: lengths are i32. A longer document is several sequences."""

_ENTRIES = 1 << 17
"""Documents whose index entries are made at a time."""


class IndexedWriter:
    """Writes documents to PREFIX.bin and PREFIX.idx in bounded memory, and goes on after a kill.

    Tokens go to PREFIX.bin.partial and lengths to PREFIX.lengths.partial; the finished files appear by renames, the
    index last. Errors: OSError.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, state: dict[str, int] | None = None) -> None:
        """`state` is what `sync` returned; what was written after it is dropped. Without it, a fresh start.

        Raises ValueError for a type of token that the format lacks.
        """
        codes = {np.dtype(name): code for code, name in TOKEN_TYPES.items()}
        if dtype not in codes:
            raise ValueError(f"tokens of {dtype} cannot be written; give one of {', '.join(map(str, codes))}")
        self.prefix, self.dtype, self._type_code = prefix, dtype, codes[dtype]
        if state and not beside(prefix, "bin.partial").exists() and not beside(prefix, "idx").exists():
            os.replace(beside(prefix, "bin"), beside(prefix, "bin.partial"))  # killed between the last two renames
        # largest_token: -1 where there is no token. open: tokens of the last document, where that is not at its end.
        self.state = {"tokens": 0, "documents": 0, "sequences": 0, "largest_token": -1, "open": 0} | (state or {})
        self._tokens = reopened(beside(prefix, "bin.partial"), self.state["tokens"] * dtype.itemsize)
        self._lengths = reopened(beside(prefix, "lengths.partial"), self.state["sequences"] * 8)

    def write(self, tokens: Tokens, lengths: Int64, *, continues: bool = False) -> None:
        """Appends documents of `lengths` [D], together all of `tokens`; empty ones are left out.

        With `continues` the last is not at its end: the first of the next call belongs to it.
        """
        state, sizes = self.state, np.array(lengths, dtype=np.int64)
        assert sizes.sum() == len(tokens), (sizes.sum(), len(tokens))
        self._tokens.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        state["tokens"] += len(tokens)
        if len(tokens):
            state["largest_token"] = max(state["largest_token"], int(tokens.max()))
        if len(sizes):
            sizes[0] += state["open"]
            state["open"] = int(sizes[-1]) if continues else 0
            sizes = sizes[: len(sizes) - continues]
        sizes = sizes[sizes > 0]
        self._lengths.write(sizes.tobytes())
        state["documents"] += len(sizes)
        state["sequences"] += len(sizes)

    def sync(self) -> dict[str, int]:
        """Brings all to the disk; returns what a writer that goes on from here needs."""
        to_disk(self._tokens)
        to_disk(self._lengths)
        return dict(self.state)

    def finish(self, **facts: Any) -> dict[str, int]:
        """Writes the index and the summary; returns what the writer knows, beside which the summary has `facts`."""
        assert not self.state["open"], "the last document is not at its end"
        self.sync()
        self.close()
        lengths_file = beside(self.prefix, "lengths.partial")
        with open(beside(self.prefix, "idx.partial"), "wb") as file:
            self._write_index(file, lengths_file)
            to_disk(file)
        known = {key: self.state[key] for key in ("tokens", "documents", "largest_token")}
        with open(beside(self.prefix, "summary.json.partial"), "w") as text:
            json.dump(known | facts, text, indent=1)
            to_disk(text)
        for suffix in ("summary.json", "bin", "idx"):
            os.replace(beside(self.prefix, f"{suffix}.partial"), beside(self.prefix, suffix))
        lengths_file.unlink()
        return known

    def close(self) -> None:
        self._tokens.close()
        self._lengths.close()

    def _write_index(self, file: BinaryIO, lengths_file: Path) -> None:
        """Streams the three arrays; a document too long for one sequence becomes several."""
        count = self.state["sequences"]
        lengths = np.memmap(lengths_file, dtype=np.int64, mode="r") if count else np.zeros(0, np.int64)
        parts = [lengths[start : start + _ENTRIES] for start in range(0, count, _ENTRIES)]
        sequences = sum(int((-(-part // LONGEST_SEQUENCE)).sum()) for part in parts)
        file.write(HEADER.pack(MAGIC, VERSION, self._type_code, sequences, count + 1))
        for part in parts:
            file.write(_cut(part)[0].astype("<i4").tobytes())
        position = 0
        for part in parts:
            sizes = _cut(part)[0]
            ends = position + np.cumsum(sizes)
            file.write(((ends - sizes) * self.dtype.itemsize).astype("<i8").tobytes())
            position = int(ends[-1])
        first = 0
        file.write(np.zeros(1, "<i8").tobytes())
        for part in parts:
            ends = first + np.cumsum(_cut(part)[1])
            file.write(ends.astype("<i8").tobytes())
            first = int(ends[-1])


def _cut(lengths: Int64) -> tuple[Int64, Int64]:
    """Lengths of the sequences of documents of `lengths` [D], and how many [D] each document has."""
    counts = -(-lengths // LONGEST_SEQUENCE)
    sizes = np.full(int(counts.sum()), LONGEST_SEQUENCE, dtype=np.int64)
    sizes[np.cumsum(counts) - 1] = lengths - (counts - 1) * LONGEST_SEQUENCE
    return sizes, counts


def reopened(path: Path, size: int) -> BinaryIO:
    """The file, cut to its first `size` bytes, for appending. Raises OSError where it is shorter."""
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    if file.tell() < size:
        raise OSError(f"{path} has {file.tell()} bytes, less than the {size} that were recorded")
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


def to_disk(file: IO[Any]) -> None:
    """What was written to the file outlives the machine from here on. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())
