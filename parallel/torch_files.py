"""Lets torch.distributed.checkpoint read and write any flat folder of files."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter


class StateFiles(Protocol):
    """A folder that is complete or does not exist for its readers: somebody else sees to that."""

    def create(self, file: str) -> AbstractContextManager[BinaryIO]:
        """A new file, durable when the block ends."""

    def open(self, file: str) -> AbstractContextManager[BinaryIO]:
        """A file for reading, seekable."""


def writer(files: StateFiles) -> FileSystemWriter:
    """Writes one file for each rank, and torch's .metadata."""
    # No copy ahead: it would be of use on a GPU only, and there it takes the stream of device 0 in a background thread.
    made = FileSystemWriter(Path(), sync_files=False, overwrite=False, per_thread_copy_ahead=0)
    made.fs = _Files(files)  # type: ignore[assignment]
    return made


def reader(files: StateFiles) -> FileSystemReader:
    """Reads what `writer` wrote."""
    made = FileSystemReader(Path())
    made.fs = _Files(files)  # type: ignore[assignment]
    return made


class _Files(FileSystemBase):
    """torch writes .metadata under another name and renames it, to make it appear whole; here the folder does."""

    def __init__(self, files: StateFiles):
        self._files = files

    def create_stream(self, path: str | os.PathLike, mode: str) -> Any:
        name = Path(path).name.removesuffix(".tmp")
        return self._files.create(name) if mode == "wb" else self._files.open(name)

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str | os.PathLike:
        return Path(suffix)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        assert Path(path).name == f"{Path(new_path).name}.tmp", (path, new_path)

    def init_path(self, path: str | os.PathLike) -> str | os.PathLike:
        return path

    def mkdir(self, path: str | os.PathLike) -> None:
        """The folder is there."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return False  # asked of a folder that was just begun

    def rm_file(self, path: str | os.PathLike) -> None:
        raise AssertionError(f"nothing is removed file by file: {path}")
