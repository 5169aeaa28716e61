"""bucket://PATH: an object store of the tests, in a folder that all processes see."""

from __future__ import annotations

from typing import Any

from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    """An object store that processes share: it has no rename, no copy and no directories to be made."""

    protocol = "bucket"
    root_marker = "/"

    def __init__(self, **options: Any):
        super().__init__(**options | {"auto_mkdir": True})

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))

    def mv(self, *_arguments: object, **_options: object) -> None:
        raise NotImplementedError("an object store has no rename")

    rename = move = mv_file = cp_file = copy = mv
