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
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from launch.atomic_files import write_atomically
from launch.data.corpus import CorpusError
from launch.data.encoders import encoder_of
from launch.data.indexed import beside, read_summary
from launch.data.indexed_writer import IndexedWriter, reopened, to_disk
from launch.data.input_files import BeginAfresh, InputFiles, Place
from launch.data.sources import matching_files
from launch.data.text_tokens import Fault, TokenisingProcesses
from launch.plurals import counted
from launch.standard_output import output_matters
from launch.user_path import user_path

_SAVE_SECONDS = 5.0
_INPUTS = "texts (a document each), JSON lines, Parquet, and .gz or .zst of these; globs may be quoted"
_TOKENIZER = "a Hugging Face tokenizer.json, or: bytes (each byte of UTF-8 is a token)"


class Preparation:
    """One corpus in the making. What a kill loses is what was written since the last save, and it is made again."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Raises CorpusError where inputs or tokenizer cannot be used, OSError where an input cannot be looked at."""
        self.options, self.prefix = options, options.output
        found = [Path(path) for pattern in options.input for path in matching_files(pattern, "--input")]
        self.encoder = encoder_of(options.tokenizer)
        if options.end_of_document is not None:
            self.encoder.token_id(options.end_of_document)
        self.inputs = InputFiles(found, options.field)
        inputs = [(str(path.resolve()), *version) for path, version in self.inputs.versions.items()]
        told = [self.encoder.identity, options.field, options.end_of_document, inputs]
        self.job = hashlib.sha256(json.dumps(told).encode()).hexdigest()
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
                try:
                    self._write()
                except BeginAfresh:
                    self._remove("state.json.partial", "lengths.partial", "bin.partial")
                    raise
            self._remove("state.json.partial", "lengths.partial", "lock")

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
        saved, options = self._saved(), self.options
        self.rejected = saved["rejected"]
        with (
            closing(IndexedWriter(self.prefix, self.encoder.dtype, saved["writer"])) as writer,
            reopened(beside(self.prefix, "rejected.jsonl"), saved["rejected_bytes"]) as listing,
            TokenisingProcesses(options.workers, options.tokenizer, options.field, options.end_of_document) as workers,
            tqdm(total=self.inputs.size, unit="B", unit_scale=True, disable=None) as bar,
        ):
            place = Place(**saved["place"])
            for progress, block in workers.map(self.inputs.read(place)):
                writer.write(block.tokens, block.lengths, continues=block.continues)
                self._reject(progress.path, block.faults, listing)
                bar.update(progress.read - bar.n)
                place = progress.place
                if time.monotonic() > self._save_at:
                    self._save(writer, listing, place)
            self._save(writer, listing, place)
            if not writer.state["documents"]:
                raise BeginAfresh(self._nothing())
            known = writer.finish(job=self.job, tokenizer=self.encoder.identity, rejected=self.rejected)
        print(f"{self.prefix}: {counted(known['documents'], 'document')}, {counted(known['tokens'], 'token')}")
        if self.rejected:
            left_out = counted(self.rejected, "bad record was", "bad records were")
            print(f"{left_out} left out, as listed in {self.prefix}.rejected.jsonl; {self._first_rejected()}")
        else:
            beside(self.prefix, "rejected.jsonl").unlink()

    def _nothing(self) -> str:
        """What to say of inputs without a document."""
        said = (
            f"{self.prefix}: no document in {counted(len(self.inputs.versions), 'file')}: "
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

    def _remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            beside(self.prefix, suffix).unlink(missing_ok=True)

    def _reject(self, path: Path, faults: list[Fault], listing: BinaryIO) -> None:
        for fault in faults:
            if self.options.strict:
                raise CorpusError(
                    f"{path}, record {fault.record}: {fault.reason}; mend it, or leave it out by "
                    "going on without --strict"
                )
            listing.write(json.dumps({"file": str(path), **asdict(fault)}).encode() + b"\n")
        self.rejected += len(faults)

    def _save(self, writer: IndexedWriter, listing: BinaryIO, place: Place) -> None:
        """From here on the same command goes on after a kill."""
        to_disk(listing)
        state = {
            "job": self.job,
            "place": asdict(place),
            "writer": writer.sync(),
            "rejected": self.rejected,
            "rejected_bytes": listing.tell(),
        }
        write_atomically(beside(self.prefix, "state.json.partial"), json.dumps(state))
        self._save_at = time.monotonic() + _SAVE_SECONDS

    def _saved(self) -> dict[str, Any]:
        """What the last save of this command left, or a fresh start."""
        path = beside(self.prefix, "state.json.partial")
        try:
            state = json.loads(path.read_text())
        except FileNotFoundError:
            return {"place": {}, "writer": None, "rejected": 0, "rejected_bytes": 0}
        except ValueError as error:
            raise CorpusError(f"{path}: is damaged ({error}); remove it to begin again") from error
        if state["job"] != self.job:
            raise CorpusError(
                f"{self.prefix}: {path.name} is of a command with other inputs, tokenizer or fields; run that one to "
                "its end, or remove it"
            )
        print(f"{self.prefix}: going on after {counted(state['writer']['documents'], 'document')}")
        return state


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    try:
        Preparation(options).run()
    except (CorpusError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
    most = max(64, 4 * len(os.sched_getaffinity(0)))
    if not 1 <= options.workers <= most:
        parser.error(f"--workers ({options.workers}) must be at least 1 and, on this machine, at most {most}")
    if not options.output.name:
        parser.error(f"--output ({options.output}) is a folder; add the name that the corpus's .bin and .idx get")
    return options


if __name__ == "__main__":
    sys.exit(main())
