"""The manifest: a checkpoint's numbers, and size and CRC-32 of each of its files and of itself."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, BinaryIO, cast

from launch.saving.storage import MANIFEST, Storage

FORMAT = 2
_BLOCK = 1 << 22

FileSums = dict[str, dict[str, int]]
"""File name -> {"bytes": size, "crc32": sum}."""


class CheckpointFiles:
    """One checkpoint's files; remembers size and CRC-32 of those that this process writes, as it writes them."""

    def __init__(self, storage: Storage, name: str):
        self.sums: FileSums = {}
        self._storage, self._name = storage, name

    @contextmanager
    def create(self, file: str) -> Iterator[BinaryIO]:
        with self._storage.create(self._name, file) as stream:
            summed = _SummedStream(stream)
            yield cast(BinaryIO, summed)
        self.sums[file] = {"bytes": summed.bytes, "crc32": summed.crc32}

    def open(self, file: str) -> AbstractContextManager[BinaryIO]:
        return self._storage.open(self._name, file)


class _SummedStream:
    """The methods of a file that its writers use. The block that opened it closes it."""

    def __init__(self, stream: BinaryIO):
        self.bytes = self.crc32 = 0
        self._stream = stream

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):  # a raw stream may take less than it is given
            written += self._stream.write(view[written:])
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.flush()


def encode(manifest: dict[str, Any]) -> bytes:
    """The manifest as it lies on disk."""
    return json.dumps({**manifest, "crc32": _own_crc32(manifest)}, indent=1).encode()


def read_manifest(storage: Storage, name: str) -> dict[str, Any]:
    """Raises OSError, ValueError or KeyError where it is not what `encode` wrote."""
    with storage.open(name, MANIFEST) as stream:
        manifest = json.loads(stream.read())
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this program reads {FORMAT}")
    if manifest.pop("crc32") != _own_crc32(manifest):
        raise ValueError("it does not match its own CRC-32")
    return manifest


def missing_file(storage: Storage, name: str, files: FileSums) -> str | None:
    """Which file of a checkpoint that was begun this process does not see as it was written, or None."""
    for file, expected in files.items():
        try:
            size = storage.written_size(name, file)
        except FileNotFoundError:
            return f"{file} was written but cannot be seen from rank 0; all nodes must share {storage.location}"
        if size != expected["bytes"]:
            return f"{file} has {size} bytes instead of {expected['bytes']}"
    return None


def damage(storage: Storage, name: str, rank: int, world_size: int, *, contents: bool = True) -> str | None:
    """The first fault among this rank's share of a complete checkpoint's files, or None.

    Reads each file once; without `contents` it looks at their sizes alone.
    """
    try:
        files = read_manifest(storage, name)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for file in list(files)[rank::world_size]:
        size = crc32 = 0
        try:
            with storage.open(name, file) as stream:
                if not contents:
                    size, crc32 = stream.seek(0, os.SEEK_END), files[file]["crc32"]
                while contents and (block := stream.read(_BLOCK)):
                    crc32, size = zlib.crc32(block, crc32), size + len(block)
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error})"
        if size != files[file]["bytes"]:
            return f"{file} has {size} bytes instead of {files[file]['bytes']}"
        if crc32 != files[file]["crc32"]:
            return f"{file} does not match its CRC-32"
    return None


def _own_crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
