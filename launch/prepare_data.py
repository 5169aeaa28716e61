"""Tokenises texts into a corpus.

    python launch/prepare_data.py --input FILES --tokenizer tokenizer.json --output PREFIX

After a kill the same command continues where it stopped. The result is the same, byte for byte, and does not depend on
the number of workers. Exit status: 0 done, 1 failed, 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from os.path import expanduser
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from launch.atomic_files import write_atomically
from launch.data.corpus import CorpusError
from launch.data.encoders import encoder_of
from launch.data.indexed import beside, read_summary
from launch.data.indexed_writer import IndexedWriter, reopened
from launch.data.sources import matching_files
from launch.data.text_inputs import BadInput, Block, Start, blocks, fault_of_text, kind_of
from launch.data.text_tokens import Fault, TokenisingProcesses
from launch.plurals import counted
from launch.standard_output import output_matters
from launch.user_path import user_path

_SAVE_SECONDS = 5.0
_INPUTS = "texts (a document each), JSON lines, Parquet, and .gz or .zst of these; globs may be quoted"
_TOKENIZER = "a Hugging Face tokenizer.json, or: bytes (each byte of UTF-8 is a token)"


@dataclass(frozen=True)
class InputPlace:
    """How far the inputs have been read: file, and the block in it."""

    file: int = 0
    position: int = 0
    record: int = 0


@dataclass(frozen=True)
class _Item:
    """An item that was read, in order: a block, or a file's end, which may have come too soon."""

    place: InputPlace
    """Where reading continues after it."""
    file: int
    read: int
    """Bytes of the file on disk."""
    fault: Fault | None = None


class Preparation:
    """One corpus in the making. What a kill loses is what was written since the last save, and it is made again."""

    def __init__(self, options: argparse.Namespace, files: list[Path]) -> None:
        """Raises CorpusError where the tokenizer or PREFIX does not fit this command."""
        self.options, self.files, self.prefix = options, files, options.output
        self.encoder = encoder_of(options.tokenizer)
        if options.end_of_document is not None:
            self.encoder.token_id(options.end_of_document)
        self._versions = [_version(path) for path in files]
        inputs = [(str(path.resolve()), *version) for path, version in zip(files, self._versions, strict=True)]
        told = [self.encoder.identity, options.field, options.end_of_document, inputs]
        self.job = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self.state_file = beside(self.prefix, "state.json.partial")
        self.rejected = 0
        self._save_at = time.monotonic() + _SAVE_SECONDS

    def run(self) -> None:
        """Tokenises what is left and writes the index. Raises CorpusError, OSError, RuntimeError."""
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        with open(beside(self.prefix, "lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CorpusError(f"{self.prefix}: another process is writing it; wait for it to end") from None
            if self._complete():
                print(f"{self.prefix}: complete already")
            else:
                self._write()
            for leftover in ("state.json.partial", "lengths.partial", "lock"):
                beside(self.prefix, leftover).unlink(missing_ok=True)

    def _complete(self) -> bool:
        if not beside(self.prefix, "idx").exists():
            return False
        summary = read_summary(self.prefix)
        if summary is None or summary.get("job") != self.job:
            written = " and ".join(beside(self.prefix, ending).name for ending in ("bin", "idx"))
            raise CorpusError(
                f"{self.prefix}: there is a corpus of other inputs, tokenizer or fields; remove {written}, or give "
                "another --output"
            )
        return True

    def _write(self) -> None:
        saved = self._saved()
        options, sizes = self.options, [size for size, _ in self._versions]
        writer = IndexedWriter(self.prefix, self.encoder.dtype, saved["writer"])
        with (
            reopened(beside(self.prefix, "rejected.jsonl"), saved["rejected_bytes"]) as listing,
            TokenisingProcesses(options.workers, options.tokenizer, options.field, options.end_of_document) as workers,
            tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar,
        ):
            try:
                for item, result in workers.map(self._read(InputPlace(**saved["place"]))):
                    if result is not None:
                        writer.write(result.tokens, result.lengths, continues=result.continues)
                    faults = [*(result.faults if result else ()), *([item.fault] if item.fault else ())]
                    self._reject(self.files[item.file], faults, listing)
                    bar.update(sum(sizes[: item.file]) + item.read - bar.n)
                    if time.monotonic() > self._save_at:
                        self._save(writer, listing, item.place)
                self._save(writer, listing, InputPlace(len(self.files)))
                if not writer.state["documents"]:
                    raise CorpusError(self._nothing())
                summary = writer.finish(job=self.job, tokenizer=self.encoder.identity, rejected=self.rejected)
            finally:
                writer.close()
        print(f"{self.prefix}: {counted(summary.documents, 'document')}, {counted(summary.tokens, 'token')}")
        if self.rejected:
            left_out = counted(self.rejected, "bad record was", "bad records were")
            print(f"{left_out} left out, as listed in {self.prefix}.rejected.jsonl; {self._first_rejected()}")
        else:
            beside(self.prefix, "rejected.jsonl").unlink()

    def _nothing(self) -> str:
        """What to say of inputs without a document; another command may begin afresh."""
        self._forget()
        said = (
            f"{self.prefix}: no document in {counted(len(self.files), 'file')}: "
            f"{counted(self.rejected, 'record is', 'records are')} bad and the rest empty"
        )
        if self.rejected:
            said += f" ({beside(self.prefix, 'rejected.jsonl')} says why; {self._first_rejected()})"
        return f"{said}; correct --input, or --field ({self.options.field})"

    def _first_rejected(self) -> str:
        """Often enough the reason for all, such as a wrong --field."""
        with open(beside(self.prefix, "rejected.jsonl"), encoding="utf-8") as listing:
            first = json.loads(listing.readline())
        return f"the first: {first['file']}, record {first['record']}, {first['reason']}"

    def _forget(self) -> None:
        """Removes what was written so far, so that nothing continues from it."""
        for leftover in ("state.json.partial", "lengths.partial", "bin.partial"):
            beside(self.prefix, leftover).unlink(missing_ok=True)

    def _read(self, place: InputPlace) -> Iterator[tuple[_Item, Block | None]]:
        for file, path in enumerate(self.files[place.file :], start=place.file):
            start = Start(place.position, place.record) if file == place.file else Start()
            following, fault = start, None
            try:
                reason = fault_of_text(path) if kind_of(path) == "text" and not start.position else None
                if reason is not None:
                    raise BadInput(reason)
                for block in blocks(path, self.options.field, start):
                    self._check_unchanged(file)
                    following = block.following
                    yield _Item(InputPlace(file, following.position, following.record), file, block.read), block
            except BadInput as error:
                self._check_unchanged(file)
                if kind_of(path) == "text" and following.position:  # half a document can be neither kept nor listed
                    raise CorpusError(
                        f"{path}: whole when it was looked through, but broke off after {following.position} bytes of "
                        f"text when it was read again ({error}); the same command goes on from there: see to the "
                        "disk or file server first, or leave the file out"
                    ) from error
                fault = Fault(following.record + 1, str(error))
            self._check_unchanged(file)
            yield _Item(InputPlace(file + 1), file, self._versions[file][0], fault), None

    def _check_unchanged(self, file: int) -> None:
        """Raises CorpusError where a file is not what it was when the command began: half a corpus would be of one
        version, half of another."""
        path, before = self.files[file], self._versions[file]
        try:
            now = _version(path)
        except OSError as error:
            found = f"cannot be found any more ({error.strerror})"
        else:
            if now == before:
                return
            found = f"has {_told(now)}"
        self._forget()
        raise CorpusError(
            f"{path}: changed while it was read: it had {_told(before)}, and {found}; "
            "run the command again, which begins afresh, when nobody writes to the inputs"
        )

    def _reject(self, path: Path, faults: list[Fault], listing: BinaryIO) -> None:
        for fault in faults:
            if self.options.strict:
                raise CorpusError(
                    f"{path}, record {fault.record}: {fault.reason}; mend it, or leave it out by "
                    "going on without --strict"
                )
            listing.write(json.dumps({"file": str(path), **asdict(fault)}).encode() + b"\n")
        self.rejected += len(faults)

    def _save(self, writer: IndexedWriter, listing: BinaryIO, place: InputPlace) -> None:
        """From here on the same command goes on after a kill."""
        state = {"job": self.job, "place": asdict(place), "writer": writer.sync(), "rejected": self.rejected}
        listing.flush()
        os.fsync(listing.fileno())
        write_atomically(self.state_file, json.dumps({**state, "rejected_bytes": listing.tell()}))
        self._save_at = time.monotonic() + _SAVE_SECONDS

    def _saved(self) -> dict[str, Any]:
        """What the last save of this command left, or a fresh start."""
        try:
            state = json.loads(self.state_file.read_text())
        except FileNotFoundError:
            return {"place": {}, "writer": None, "rejected_bytes": 0}
        except ValueError as error:
            raise CorpusError(f"{self.state_file}: is damaged ({error}); remove it to begin again") from error
        if state["job"] != self.job:
            raise CorpusError(
                f"{self.prefix}: {self.state_file.name} is of a command with other inputs, tokenizer or fields; run "
                "that one to its end, or remove it"
            )
        self.rejected = state["rejected"]
        print(f"{self.prefix}: going on after {counted(state['writer']['documents'], 'document')}")
        return state


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    try:
        Preparation(options, _files(options.input)).run()
    except (CorpusError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _version(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns). Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _told(version: tuple[int, int]) -> str:
    return f"{version[0]} bytes of {datetime.fromtimestamp(version[1] / 1e9)}"


def _files(patterns: Sequence[str]) -> list[Path]:
    """Each file once, in the order given, those of a glob by name. Raises CorpusError."""
    found: dict[str, None] = {}
    for pattern in patterns:
        found |= dict.fromkeys(matching_files(pattern, "--input"))
    return [Path(path) for path in found]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=expanduser, required=True, metavar="FILE", help=_INPUTS)
    parser.add_argument("--tokenizer", type=expanduser, required=True, metavar="FILE", help=_TOKENIZER)
    parser.add_argument("--output", type=user_path, required=True, metavar="PREFIX", help="path of .bin and .idx")
    parser.add_argument("--field", default="text", metavar="NAME", help="field or column of the text (default: text)")
    parser.add_argument("--end_of_document", metavar="TOKEN", help="to put after each document: <|endoftext|>")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one for each processor"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad record, instead of listing it")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers ({options.workers}) must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
