"""Checkpoints of a run: saved whole or not at all, beside the training, verified before use, some of them kept.

    DIRECTORY/step-00000150/                  complete
        manifest.json                         progress, settings, data, and size and CRC-32 of every file, its own too
        .metadata  __0_0.distcp ...           torch.distributed.checkpoint; see `parallel.state` for the keys

There is no `latest` file to go stale: the newest complete directory is the latest. How one becomes complete at once is
`launch.saving.storage`'s business.

Two threads talk over two groups, so that no collective of the one ever meets one of the other: the training thread,
and the one that writes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from launch.data.batches import Batches
from launch.data.cursor import ACCEPT_DATA
from launch.saving import resume_checks
from launch.saving.checkpoint_names import CheckpointError, complete_steps, removable, step_name
from launch.saving.checkpoint_records import Progress, Resumed, Saved
from launch.saving.manifest import FORMAT, CheckpointFiles, damage, encode, missing_file, read_manifest
from launch.saving.ranks import Ranks, in_words
from launch.saving.resume_checks import Settings
from launch.saving.storage import Storage
from parallel.state import load_state, save_state
from parallel.zero import ZeroEngine
from parallel.zero_state import Snapshot


class Checkpoints:
    """The checkpoints of one run. Every method is collective: all ranks call it, in the same order."""

    def __init__(
        self,
        storage: Storage,
        *,
        keep_last: int,
        keep_every: int = 0,
        settings: Settings,
        asynchronous: bool = False,
        accept_changes: tuple[str, ...] = (),
    ):
        """`settings` are stored with each checkpoint and compared at a resume."""
        self.storage, self.keep_last, self.keep_every = storage, keep_last, keep_every
        self.settings, self.asynchronous, self.accept_changes = settings, asynchronous, accept_changes
        self._training = Ranks("checkpoints")
        self._writing = Ranks("checkpoint writers")  # the thread that writes, or the training one in its place
        self._in_flight: Future[Saved] | None = None

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(
        self, engine: ZeroEngine, progress: Progress, batches: Batches, losses: Mapping[str, float] | None = None
    ) -> None:
        """Starts a save: asynchronously it returns once the state is copied to host memory (on a GPU: is being copied).

        `outcome` must have given the result of the one before. `batches` are what the run reads next.
        """
        assert self._in_flight is None, "the outcome of the save before has not been asked for"
        begun = time.perf_counter()
        snapshot = engine.snapshot(copy=self.asynchronous)
        facts = {"progress": asdict(progress), "losses": dict(losses or {})}
        future: Future[Saved] = Future()

        def work() -> None:
            try:
                future.set_result(self._write(snapshot, engine.shards, facts, batches, begun))
            except BaseException as error:  # raised by `outcome`, in the training thread
                future.set_exception(error)

        self._in_flight = future
        if self.asynchronous:
            threading.Thread(target=work, name="checkpoint", daemon=True).start()
        else:
            work()

    @property
    def saving(self) -> bool:
        """Whether a save's outcome has not been given yet."""
        return self._in_flight is not None

    def outcome(self, *, wait: bool) -> Saved | None:
        """How the save in flight ended; None if there is none, or, without `wait`, if some rank still writes."""
        if self._in_flight is None:
            return None
        if not wait and not self._training.all(self._in_flight.done()):
            return None
        saved, self._in_flight = self._in_flight.result(), None
        return saved

    def _write(
        self,
        snapshot: Snapshot,
        shards: Mapping[str, Any],
        facts: dict[str, Any],
        batches: Batches,
        begun: float,
    ) -> Saved:
        """The whole of a save, but for the copy. Collective over the writers."""
        step = facts["progress"]["step"]
        name, path, ranks = step_name(step), self.path(step), self._writing
        files = CheckpointFiles(self.storage, name)

        def finish(complete: bool, error: CheckpointError | None) -> Saved:
            return Saved(path, time.perf_counter() - begun, error, complete)

        try:
            ranks.on_first(lambda: self.storage.begin(name))
            snapshot.wait()
            save_state(files, snapshot.fragments, shards, ranks.group)
            parts = ranks.everywhere(
                lambda: (files.sums, resume_checks.next_batches(batches, step, ranks.rank, ranks.world_size))
            )
            manifest = {
                "format": FORMAT,
                **facts,
                "optimizer_steps": snapshot.step_count,
                "loss_scaler": snapshot.loss_scaler,
                "settings": self.settings,
                "next_batches": {at: digest for _, hashes in parts for at, digest in hashes.items()},
                "torch": torch.__version__,
                "files": {file: entry for sums, _ in parts for file, entry in sums.items()},
            }
            ranks.on_first(lambda: self._complete(name, manifest))
        except (CheckpointException, CheckpointError) as error:
            if ranks.rank == 0:
                self.storage.discard(name)
            return finish(False, CheckpointError(f"checkpoint {path} could not be written: {_reason(error)}"))
        try:
            ranks.on_first(self._remove_old)
        except CheckpointError as error:
            return finish(True, CheckpointError(f"checkpoint {path} is complete, but an older one stayed: {error}"))
        return finish(True, None)

    def _complete(self, name: str, manifest: dict[str, Any]) -> None:
        missing = missing_file(self.storage, name, manifest["files"])
        if missing:
            raise OSError(missing)
        self.storage.complete(name, encode(manifest))

    def _remove_old(self) -> None:
        for step in removable(complete_steps(self.storage), self.keep_last, self.keep_every):
            self.storage.remove(step_name(step))

    def check_writable(self) -> None:
        """Every rank writes a small file, and rank 0 sees them all, as a save will need.

        Raises CheckpointError: better now than after the steps that a save would have kept.
        """
        name = "step-probe"
        files = [f"rank-{rank}" for rank in range(self._writing.world_size)]

        def write() -> None:
            with self.storage.create(name, files[self._writing.rank]) as stream:
                stream.write(b"\n")

        def see() -> None:
            for file in files:
                self.storage.written_size(name, file)

        try:
            self._writing.on_first(lambda: self.storage.begin(name))
            self._writing.everywhere(write)
            self._writing.on_first(see)
        except CheckpointError as error:
            raise CheckpointError(
                f"checkpoints could not be written to {self.storage.location}: {error}; give checkpoint.directory a "
                "place that every node can write and sees alike"
            ) from error
        finally:
            if self._writing.rank == 0:
                self.storage.discard(name)

    # -- resuming ------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first (as rank 0 sees them)."""
        return self._training.on_first(lambda: complete_steps(self.storage))

    def load_latest(self, engine: ZeroEngine) -> Resumed | None:
        """Loads the newest complete checkpoint, whatever layout wrote it; None where there is none.

        Raises CheckpointError if it is damaged (naming the newest sound one before it), or of another model or run.
        """
        steps = self.steps()
        if not steps:
            return None
        name, path = step_name(steps[-1]), self.path(steps[-1])
        found = self._damage(steps[-1])
        if found:
            sound = next((step for step in steps[-2::-1] if not self._damage(step)), -1)
            offer = (
                f"go back to the newest sound one: python launch/rollback.py RUN --step {sound}"
                if sound >= 0
                else f"there is no sound one; move {', '.join(map(step_name, steps))} away to start again"
            )
            raise CheckpointError(f"checkpoint {path} is damaged: {found}; {offer}")
        manifest = read_manifest(self.storage, name)
        told = self._check_same_run(path, manifest)
        fragments = list(engine.fragments())
        try:
            load_state(CheckpointFiles(self.storage, name), fragments, engine.shards, self._training.group)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} could not be loaded: {_reason(error)}") from error
        engine.adopt_state(manifest["optimizer_steps"])
        engine.loss_scaler_state = manifest["loss_scaler"]
        progress = Progress(**manifest["progress"])
        rate = resume_checks.another_learning_rate(manifest["settings"], self.settings, progress.step)
        told += [rate] if rate else []
        return Resumed(path, progress, manifest["losses"], manifest["next_batches"], told)

    def check_batches(self, resumed: Resumed, batches: Batches) -> None:
        """Raises CheckpointError, naming the first difference, unless the run goes on with the data it would have."""
        if ACCEPT_DATA in self.accept_changes:
            return
        step, ranks = resumed.progress.step, self._training
        parts = ranks.everywhere(lambda: resume_checks.next_batches(batches, step, ranks.rank, ranks.world_size))
        other = resume_checks.other_batch(resumed.batches, {at: one for part in parts for at, one in part.items()})
        if other:
            raise CheckpointError(
                f"checkpoint {resumed.path} would go on with other data: {other}; restore what data and seed were, or, "
                f"if the change is meant, name {ACCEPT_DATA} in checkpoint.accept_changes"
            )

    def _check_same_run(self, path: str, manifest: dict[str, Any]) -> list[str]:
        """The allowed differences. Raises CheckpointError with those that are not allowed."""
        refused, told = resume_checks.differences(manifest["settings"], self.settings, self.accept_changes)
        if refused:
            raise CheckpointError(f"checkpoint {path} is of another {resume_checks.refusal(refused)}")
        return told

    def _damage(self, step: int) -> str | None:
        """What is wrong with a complete checkpoint's files, or None. The ranks share the reading."""
        name, ranks = step_name(step), self._training
        found = ranks.everywhere(lambda: damage(self.storage, name, ranks.rank, ranks.world_size))
        return next((fault for fault in found if fault), None)

    # -- inside --------------------------------------------------------------------------------------------------------

    def path(self, step: int) -> str:
        """The name of the checkpoint of `step`, for users."""
        return f"{self.storage.location}/{step_name(step)}"


def _reason(error: BaseException) -> str:
    """The ranks' own words, without the traceback that torch adds."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {in_words(failure[0])}" for rank, failure in sorted(error.failures.items()))
    return str(error)
