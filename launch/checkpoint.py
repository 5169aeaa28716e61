"""Checkpoints of a run: saved whole or not at all, verified before use, the last few kept.

    RUN/checkpoints/step-00000150/            complete: it got this name by one rename, after everything else
        manifest.json                         progress, model, data, and size and CRC-32 of every file, its own included
        .metadata  __0_0.distcp ...           torch.distributed.checkpoint; see `parallel.state` for the keys
    RUN/checkpoints/step-00000200.partial/    a save or removal in progress or killed; never read, cleared by the next

There is no `latest` file to go stale: the newest complete directory is the latest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from parallel.state import load_state, save_state
from parallel.zero import ZeroEngine

FORMAT = 1
_COMPLETE = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be loaded; the message says which and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done, skipped ones included: the index of the next batch."""
    tokens: int = 0
    """Tokens seen."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data cursor's record, plain JSON (see `launch.cursor`): what the order of the data depends on besides the
    step."""


class Checkpoints:
    """The checkpoint directory of one run. Every method is collective: all ranks call it."""

    def __init__(self, directory: Path, *, keep_last: int, model: dict[str, Any], data_fingerprint: str):
        """`model` and `data_fingerprint` are stored with each checkpoint and compared at a resume."""
        self.directory, self.keep_last = directory, keep_last
        self.model, self.data_fingerprint = model, data_fingerprint
        self._group = dist.new_group(backend="gloo")  # talk between hosts, beside the training's own collectives
        self._first = dist.get_rank() == 0

    def save(self, engine: ZeroEngine, progress: Progress) -> Path:
        """Writes one checkpoint and removes those beyond keep_last; returns its directory.

        Raises CheckpointError on every rank if any rank fails; earlier checkpoints are untouched then.
        """
        final = self._path(progress.step)
        partial = final.with_suffix(".partial")
        try:
            self._on_first(lambda: self._make_room(partial))
            save_state(partial, engine.fragments(), engine.shards, self._group)
            files = self._everywhere(lambda: _checksums(partial, dist.get_rank(), dist.get_world_size()))
            manifest = {
                "format": FORMAT,
                "progress": asdict(progress),
                "optimizer_steps": engine.step_count,
                "loss_scaler": engine.loss_scaler_state,
                "model": self.model,
                "data_fingerprint": self.data_fingerprint,
                "torch": torch.__version__,
                "files": {name: entry for part in files for name, entry in part.items()},
            }
            self._on_first(lambda: _complete(partial, final, manifest))
        except (CheckpointException, CheckpointError, OSError) as error:
            if self._first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} could not be written: {_reason(error)}") from error
        try:
            self._on_first(self._remove_old)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {final} is complete, but an older one stayed: {error}") from error
        return final

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first (as rank 0's file system shows them)."""
        box = [self._steps_here() if self._first else []]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def load_latest(self, engine: ZeroEngine) -> Progress | None:
        """Continues from the newest complete checkpoint, whatever layout wrote it; None where there is none.

        Raises CheckpointError if it is damaged (naming the newest sound one before it), or of another model or corpus.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        damage = self.damage(path)
        if damage:
            sound = next((step for step in steps[-2::-1] if not self.damage(self._path(step))), -1)
            newer = ", ".join(self._path(step).name for step in steps if step > sound)
            offer = (
                f"the newest sound one is {self._path(sound).name}: move {newer} away to continue from there"
                if sound >= 0
                else f"there is no sound one; move {newer} away to start again"
            )
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}; {offer}")
        manifest = _read_manifest(path)
        self._check_same_job(path, manifest)
        fragments = list(engine.fragments())
        try:
            load_state(path, fragments, engine.shards, self._group)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} could not be loaded: {_reason(error)}") from error
        engine.adopt_state(fragments, manifest["optimizer_steps"])
        engine.loss_scaler_state = manifest["loss_scaler"]
        return Progress(**manifest["progress"])

    def damage(self, path: Path) -> str | None:
        """What is wrong with a complete checkpoint's files, or None. The ranks share the reading."""
        found = self._everywhere(lambda: _damage(path, dist.get_rank(), dist.get_world_size()))
        return next((damage for damage in found if damage), None)

    def _check_same_job(self, path: Path, manifest: dict[str, Any]) -> None:
        differences = [
            f"model.{key} is {manifest['model'].get(key)!r} there and {value!r} here"
            for key, value in self.model.items()
            if manifest["model"].get(key) != value
        ]
        if differences:
            raise CheckpointError(
                f"checkpoint {path} is of another model: {'; '.join(differences)}; give this model another job.name"
            )
        if manifest["data_fingerprint"] != self.data_fingerprint:
            raise CheckpointError(
                f"checkpoint {path} was trained on other data (fingerprint {manifest['data_fingerprint'][:12]}, here "
                f"{self.data_fingerprint[:12]}): the corpus, its tokenizer or the split changed; restore it, or choose "
                "another job.name"
            )

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _steps_here(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        matches = (_COMPLETE.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def _make_room(self, partial: Path) -> None:
        """An empty directory to save into; what killed saves and removals left is removed."""
        for leftover in self.directory.glob("*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def _remove_old(self) -> None:
        for step in self._steps_here()[: -self.keep_last]:
            doomed = self._path(step).with_suffix(".partial")  # from now on nobody takes it for a checkpoint
            self._path(step).rename(doomed)
            shutil.rmtree(doomed)

    def _on_first(self, action: Callable[[], Any]) -> None:
        """Runs `action` on rank 0; every rank waits, and raises CheckpointError if it failed."""
        self._everywhere(lambda: action() if self._first else None)

    def _everywhere(self, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on every rank and returns all results; raises CheckpointError everywhere if any rank failed."""
        try:
            outcome: tuple[Any, str | None] = (action(), None)
        except OSError as error:
            outcome = (None, f"rank {dist.get_rank()}: {error}")
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            raise CheckpointError("; ".join(failures))
        return [result for result, _ in outcomes]


def newest_checkpoint(directory: Path, step: int | None = None) -> Path:
    """The newest complete checkpoint in a run's `directory`, or the one at `step`, for readers outside the run.

    Looks at the manifest and the files' sizes, not at their checksums. Needs no process group. Raises CheckpointError.
    """
    paths = directory.iterdir() if directory.is_dir() else ()
    found = {int(match.group(1)): path for path in paths if (match := _COMPLETE.fullmatch(path.name))}
    if not found:
        raise CheckpointError(f"{directory} holds no complete checkpoint; train the run until it saves one")
    if step is not None and step not in found:
        steps = ", ".join(map(str, sorted(found)))
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; there are those of steps {steps}")
    path = found[max(found) if step is None else step]
    try:
        files = _read_manifest(path)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: manifest.json cannot be read ({error})") from error
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {size} bytes instead of {expected['bytes']}; give --step to "
                "take another"
            )
    return path


def _complete(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """The last writes of a save; after the rename the checkpoint exists."""
    with open(partial / "manifest.json", "w") as file:
        json.dump({**manifest, "crc32": _own_crc32(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(partial)
    partial.rename(final)
    _sync_directory(final.parent)


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Raises OSError, ValueError or KeyError where it is not what `_complete` wrote."""
    manifest = json.loads((directory / "manifest.json").read_text())
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this program reads {FORMAT}")
    if manifest.pop("crc32") != _own_crc32(manifest):
        raise ValueError("it does not match its own CRC-32")
    return manifest


def _own_crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(directory: Path, rank: int, world_size: int) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of this rank's share of the files."""
    share = sorted(path for path in directory.iterdir())[rank::world_size]
    return {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in share}


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _damage(directory: Path, rank: int, world_size: int) -> str | None:
    """The first fault among this rank's share of the files."""
    try:
        files = _read_manifest(directory)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json cannot be read ({error})"
    for name in sorted(files)[rank::world_size]:
        path, expected = directory / name, files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _crc32(path) != expected["crc32"]:
            return f"{name} does not match its CRC-32"
    return None


def _reason(error: BaseException) -> str:
    """The ranks' own words, without the traceback that torch adds."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
    return str(error)
