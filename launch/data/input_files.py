"""The files that a corpus is made of: read one after the other, from any place, for as long as nobody changes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from launch.data.corpus import CorpusError
from launch.data.text_inputs import BadInput, Block, Start, blocks, check_text, kind_of
from launch.data.text_tokens import Fault, TokenisedBlock, without_documents


class BeginAfresh(CorpusError):
    """Ends a command, and nothing may continue from what it has written."""


@dataclass(frozen=True)
class Place(Start):
    """How far the files have been read: a block of one of them."""

    file: int = 0


@dataclass(frozen=True)
class Progress:
    """What was reached by reading a block, or a file's end."""

    path: Path
    place: Place
    """Where reading continues."""
    read: int
    """Bytes on disk, of all files up to here."""


class Version(NamedTuple):
    """What tells a file from one that was written in its place."""

    bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Version:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        return f"{self.bytes} bytes of {datetime.fromtimestamp(self.changed_ns / 1e9)}"


class InputFiles:
    """Each once, in the order given. `field` names the column of Parquet files."""

    def __init__(self, paths: Iterable[Path], field: str) -> None:
        """Raises OSError."""
        self._field = field
        self.versions = {path: Version.of(path) for path in paths}
        self._before = list(accumulate((version.bytes for version in self.versions.values()), initial=0))
        self.size = self._before[-1]
        """Bytes of all on disk."""

    def read(self, place: Place) -> Iterator[tuple[Progress, Block | TokenisedBlock]]:
        """The blocks from `place` on; at the end of each file its fault, if it has one, and no documents.

        Raises BeginAfresh where a file has changed, CorpusError where a text breaks off that was whole before.
        """
        for file, path in enumerate(self.versions):
            if file < place.file:
                continue
            at = place if file == place.file else Start()
            is_text, broken = kind_of(path) == "text", None
            try:
                if is_text and not at.position:
                    check_text(path)
                for block in blocks(path, self._field, at):
                    self._check_unchanged(path)
                    at = block.following
                    yield Progress(path, Place(at.position, at.record, file), self._before[file] + block.read), block
            except BadInput as error:
                broken = error
            self._check_unchanged(path)
            if broken and is_text and at.position:  # half a document can be neither kept nor listed
                raise CorpusError(
                    f"{path}: whole when it was looked through, but broke off after {at.position} bytes of "
                    f"text when it was read again ({broken}); the same command goes on from there: see to the "
                    "disk or file server first, or leave the file out"
                ) from broken
            faults = [Fault(at.record + 1, str(broken))] if broken else []
            yield Progress(path, Place(file=file + 1), self._before[file + 1]), without_documents(faults)

    def _check_unchanged(self, path: Path) -> None:
        """Half a corpus would be of one version, half of another."""
        before = self.versions[path]
        try:
            now = Version.of(path)
            if now == before:
                return
            found = f"has {now}"
        except OSError as error:
            found = f"cannot be found any more ({error.strerror})"
        raise BeginAfresh(
            f"{path}: changed while it was read: it had {before}, and {found}; "
            "run the command again, which begins afresh, when nobody writes to the inputs"
        )
