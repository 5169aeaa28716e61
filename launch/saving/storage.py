"""Where checkpoints lie: a directory of a file system, or a bucket of an object store. Nothing else knows which.

A checkpoint is a flat folder of files. It is complete, and listed, from the moment that `complete` has written its
manifest, and no longer listed from the moment that `remove` begins.

    file system     files go to NAME.partial; fsync of each file and of the folder, then one rename to NAME
    object store    files go to NAME/, the manifest last, in one request; there is no rename

Of the file system this asks that an fsynced file survives, that a rename within a directory is atomic, and that a file
closed on one node can be opened on another: POSIX, NFS and the parallel file systems give that. Of the object store it
asks that what was written can be read and listed at once: S3, GCS and Azure give that.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

MANIFEST = "manifest.json"
"""The file whose presence makes a checkpoint of an object store complete."""


class Storage(Protocol):
    """Checkpoints by name. Methods raise OSError, or what the object store's client raises, where storage fails."""

    location: str
    """The name of the place, for users."""

    def names(self) -> list[str]:
        """Complete checkpoints, and whatever else lies beside them under a final name."""

    def begin(self, name: str) -> None:
        """Makes room for a checkpoint; removes what killed saves and removals have left."""

    def create(self, name: str, file: str) -> AbstractContextManager[BinaryIO]:
        """A new file of a checkpoint that was begun; durable when the block ends."""

    def written_size(self, name: str, file: str) -> int:
        """Bytes of a file of a checkpoint that was begun, as this process sees it. FileNotFoundError: it does not."""

    def complete(self, name: str, manifest: bytes) -> None:
        """Writes the manifest and lets the checkpoint appear, at once."""

    def discard(self, name: str) -> None:
        """Removes a checkpoint that was begun, as far as that is possible; raises nothing."""

    def open(self, name: str, file: str) -> AbstractContextManager[BinaryIO]:
        """A file of a complete checkpoint, for reading; FileNotFoundError where it is missing."""

    def remove(self, name: str) -> None:
        """Removes a complete checkpoint, which is no longer listed from the start of the removal."""

    def set_aside(self, name: str, folder: str) -> None:
        """Moves a complete checkpoint into a folder beside it, where nobody looks for it. Once it is listed no more, it
        is whole there."""


class LocalStorage:
    """A directory of a file system that all nodes share."""

    def __init__(self, directory: Path):
        self.location, self._directory = str(directory), directory

    def names(self) -> list[str]:
        if not self._directory.is_dir():
            return []
        return [path.name for path in self._directory.iterdir() if path.suffix != ".partial"]

    def begin(self, name: str) -> None:
        for leftover in self._directory.glob("step-*.partial"):  # the directory may hold what is not ours
            shutil.rmtree(leftover)
        self._partial(name).mkdir(parents=True)

    @contextmanager
    def create(self, name: str, file: str) -> Iterator[BinaryIO]:
        with open(self._partial(name) / file, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def written_size(self, name: str, file: str) -> int:
        return (self._partial(name) / file).stat().st_size

    def complete(self, name: str, manifest: bytes) -> None:
        with self.create(name, MANIFEST) as stream:
            stream.write(manifest)
        _sync_directory(self._partial(name))
        self._partial(name).rename(self._directory / name)
        _sync_directory(self._directory)

    def discard(self, name: str) -> None:
        shutil.rmtree(self._partial(name), ignore_errors=True)

    def open(self, name: str, file: str) -> AbstractContextManager[BinaryIO]:
        return open(self._directory / name / file, "rb")

    def remove(self, name: str) -> None:
        doomed = self._partial(name)  # from now on nobody takes it for a checkpoint
        (self._directory / name).rename(doomed)
        shutil.rmtree(doomed)

    def set_aside(self, name: str, folder: str) -> None:
        (self._directory / folder).mkdir(exist_ok=True)
        (self._directory / name).rename(self._directory / folder / name)
        _sync_directory(self._directory / folder)
        _sync_directory(self._directory)

    def _partial(self, name: str) -> Path:
        return self._directory / f"{name}.partial"


class ObjectStorage:
    """A prefix of an object store that fsspec reaches."""

    def __init__(self, url: str):
        """Raises what `check_client` does."""
        from fsspec.core import url_to_fs

        self.location = url.rstrip("/")
        self._fs, root = url_to_fs(self.location, use_listings_cache=False)
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        return [path.split("/")[-2] for path in self._fs.glob(self._path("*", MANIFEST))]

    def begin(self, name: str) -> None:
        complete = set(self.names())
        for path in self._fs.glob(f"{self._root}/step-*"):
            if path.rstrip("/").split("/")[-1] not in complete:
                self._fs.rm(path, recursive=True)

    def create(self, name: str, file: str) -> AbstractContextManager[BinaryIO]:
        return self._fs.open(self._path(name, file), "wb")

    def written_size(self, name: str, file: str) -> int:
        self._fs.invalidate_cache()
        return self._fs.info(self._path(name, file))["size"]

    def complete(self, name: str, manifest: bytes) -> None:
        self._fs.pipe_file(self._path(name, MANIFEST), manifest)

    def discard(self, name: str) -> None:
        try:
            self._fs.rm(f"{self._root}/{name}", recursive=True)
        except Exception:  # clients have errors of their own; what stays is removed by the next `begin`
            return

    def open(self, name: str, file: str) -> AbstractContextManager[BinaryIO]:
        return self._fs.open(self._path(name, file), "rb")

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name, MANIFEST))
        self._fs.rm(f"{self._root}/{name}", recursive=True)

    def set_aside(self, name: str, folder: str) -> None:
        files = self._fs.find(f"{self._root}/{name}")
        self._fs.copy(files, [self._path(folder, f"{name}/{path.rsplit('/', 1)[1]}") for path in files])
        self.remove(name)

    def _path(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"


def storage_at(location: str) -> Storage:
    """The storage at a path or at a URL such as s3://bucket/run; file:// is a path. Raises what `check_client` does."""
    path = location.removeprefix("file://")
    return ObjectStorage(location) if "://" in path else LocalStorage(Path(path))


def check_client(location: str) -> None:
    """Looks for the client that reads `location`, without reaching for it.

    Raises ValueError for a protocol that fsspec does not know, or one with a single slash, which would be a local
    folder; ImportError where its package is missing.
    """
    from fsspec import get_filesystem_class

    protocol, separator, _ = location.partition("://")
    if separator:
        get_filesystem_class(protocol)
    elif mistyped := re.match(r"(\w+):/", location):
        raise ValueError(f"a URL begins with {mistyped[1]}://, with two slashes")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
