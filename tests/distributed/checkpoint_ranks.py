"""What the ranks of the checkpoint tests do."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import fsspec
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from launch import resuming
from launch.build import build_engine
from launch.config import JobConfig
from launch.data.batches import Batches, SequenceSampler
from launch.data.corpus import Corpus
from launch.saving import resume_checks
from launch.saving.checkpoint import Checkpoints
from launch.saving.checkpoint_names import CheckpointError
from launch.saving.checkpoint_records import Progress, Saved
from launch.saving.ranks import Ranks
from launch.saving.storage import LocalStorage, storage_at
from launch.stepper import Stepper
from parallel.mesh import ParallelMesh
from parallel.state import StateMismatch
from tests.distributed.bucket_store import Bucket
from tests.distributed.checkpoint_states import LocalParameter, RankState

VOCABULARY, LENGTH, GLOBAL_BATCH, SAVED_AT, END = 61, 16, 4, 2, 4


fsspec.register_implementation("bucket", Bucket, clobber=True)


@dataclass(frozen=True)
class Layout:
    tp: int
    cp: int
    dp: int
    stage: int
    precision: str = "fp32"

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp

    def __str__(self) -> str:
        return f"{self.tp}x{self.cp}x{self.dp}-stage{self.stage}-{self.precision}"

    def job(self) -> JobConfig:
        """A two-layer GQA model with QK-norm and biases; 61 tokens, which two tensor-parallel ranks pad."""
        return JobConfig.from_yaml(
            f"""
            model:
              {{vocab_size: {VOCABULARY}, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
               num_attention_heads: 4, num_key_value_heads: 2, qk_norm: true, attention_bias: qkv,
               attention_backend: math}}
            parallel:
              {{tensor_parallel_size: {self.tp}, context_parallel_size: {self.cp}, zero_stage: {self.stage}}}
            data: {{source: files, files: [unused], tokenizer: unused}}
            optimizer: {{learning_rate: 0.01, warmup_steps: 2}}
            training:
              {{sequence_length: {LENGTH}, global_batch_size: {GLOBAL_BATCH}, max_steps: {END},
               precision: {self.precision}, gradient_clipping: 0.5}}
            """
        )


class Rank:
    """One rank with its engine, training on a corpus of random tokens."""

    def __init__(self, layout: Layout):
        job = layout.job()
        self.mesh = ParallelMesh.create(job.mesh_shape(dist.get_world_size()))
        with patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True):
            self.engine, _ = build_engine(job, self.mesh, torch.device("cpu"))
        if layout.precision == "fp16":
            self.engine.loss_scaler_state = {"cur_scale": 1024.0}  # the first one overflows
        self.settings = resume_checks.settings(job)
        tokens = np.random.default_rng(3).integers(0, VOCABULARY, 2000).astype(np.uint8)
        self.batches = Batches(
            SequenceSampler(Corpus.from_documents("training", tokens, [len(tokens)], "0"), LENGTH, seed=0),
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=1,
            data_parallel_size=self.mesh.dp_size,
            dp_rank=self.mesh.dp_rank,
        )
        self.stepper = Stepper(job, self.mesh, self.engine)

    def checkpoints(self, location: Path | str, **changes: Any) -> Checkpoints:
        wanted = {"settings": self.settings, "keep_last": 3} | changes
        return Checkpoints(storage_at(str(location)), **wanted)

    def save(self, checkpoints: Checkpoints, step: int) -> str:
        """Saves as of `step`, and waits for it; what went wrong, or nothing."""
        checkpoints.save(self.engine, progress_at(step), self.batches)
        saved = checkpoints.outcome(wait=checkpoints.asynchronous)
        assert saved is not None and saved.complete == (saved.error is None)
        return str(saved.error or "")

    def train(self, first: int, stop: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the steps."""
        stepper, batches = self.stepper, self.batches
        outcomes = [stepper.train(step, stepper.cut(batches.micro_batches(step))) for step in range(first, stop)]
        assert [outcome.step for outcome in outcomes] == list(range(first + 1, stop + 1))
        return [(outcome.loss, outcome.grad_norm) for outcome in outcomes]

    def state(self) -> RankState:
        kept = {fragment.name: fragment for fragment in self.engine.fragments()}
        parameters = {}
        for name, parameter in self.engine.model.named_parameters():
            shard, fragment = self.engine.shards[name], kept.get(name)
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.engine.settings.stage == 3):
                working = parameter.detach().float().numpy().copy()
            parameters[name] = LocalParameter(
                local_shape=tuple(working.shape),
                full_shape=shard.full_shape,
                dim=shard.dim,
                start=fragment.start if fragment else None,
                state={kind: part.detach().numpy().copy() for kind, part in fragment.tensors.items()}
                if fragment
                else {},
                working=working,
            )
        return RankState(self.mesh.tp_rank, self.engine.step_count, self.engine.loss_scaler_state, parameters)


def progress_at(step: int) -> Progress:
    return Progress(step, step * GLOBAL_BATCH * LENGTH)


@dataclass(frozen=True)
class Written:
    """An uninterrupted run of one rank, saved at SAVED_AT in the background of what follows."""

    saved: RankState
    numbers: list[tuple[float, float]]
    ended: RankState


def write(layouts: Sequence[Layout], folder: Path) -> list[Written]:
    """Trains each layout to END and saves it on the way, under folder/LAYOUT."""
    written = []
    for layout in layouts:
        rank = Rank(layout)
        randomness = torch.get_rng_state()
        rank.train(0, SAVED_AT)
        assert torch.equal(torch.get_rng_state(), randomness), "training draws random numbers, which nothing stores"
        saved = rank.state()
        checkpoints = rank.checkpoints(folder / str(layout), asynchronous=True)
        checkpoints.save(rank.engine, progress_at(SAVED_AT), rank.batches)
        written.append(Written(saved, rank.train(SAVED_AT, END), rank.state()))
        outcome = checkpoints.outcome(wait=True)
        assert outcome is not None and outcome.error is None
    return written


@dataclass(frozen=True)
class Read:
    """What one rank got from a checkpoint, and how it trained on, if it did."""

    progress: Progress
    loaded: RankState
    numbers: list[tuple[float, float]]
    ended: RankState | None


def read(layouts: Sequence[Layout], sources: Sequence[Sequence[Path]]) -> list[list[Read]]:
    """Loads each layout's sources one after the other into one engine, over what the one before left.

    It trains on after the first (which meets a fresh engine) and the second (which meets a used one). Nothing touches
    the parameters between the second training and the third load: what ZeRO-3 keeps gathered is then still gathered.
    """
    results = []
    for layout, directories in zip(layouts, sources, strict=True):
        rank, reads = Rank(layout), list[Read]()
        for position, directory in enumerate(directories):
            checkpoints = rank.checkpoints(directory)
            resumed = checkpoints.load_latest(rank.engine)
            assert resumed is not None
            checkpoints.check_batches(resumed, rank.batches)
            loaded = rank.state()
            numbers = rank.train(SAVED_AT, END) if position < 2 else []
            reads.append(Read(resumed.progress, loaded, numbers, rank.state() if position == 0 else None))
        results.append(reads)
    return results


def refusals(layout: Layout, attempts: Sequence[tuple[Path, dict[str, Any]]]) -> list[str | None]:
    """What a resume says to each directory, under the given changes to what it compares; None if it loads."""
    rank, said = Rank(layout), list[str | None]()
    for directory, changes in attempts:
        stored = changes | {"settings": rank.settings | changes.get("settings", {})}
        sampler = SequenceSampler(rank.batches.source.corpus, LENGTH, stored.pop("data_seed", 0))
        checkpoints = rank.checkpoints(directory, **stored)
        try:
            resumed = checkpoints.load_latest(rank.engine)
            assert resumed is not None
            checkpoints.check_batches(resumed, replace(rank.batches, source=sampler))
            said.append(None)
        except CheckpointError as error:
            said.append(str(error))
    return said


def save_often(
    layout: Layout,
    location: Path | str,
    steps: Sequence[int],
    asynchronous: bool,
    keep_last: int = 3,
    keep_every: int = 0,
) -> list[list[int]]:
    """Trains and saves at each step; the complete checkpoints after each save."""
    rank, seen = Rank(layout), []
    checkpoints = rank.checkpoints(location, asynchronous=asynchronous, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        rank.train(0, 1)
        assert not rank.save(checkpoints, step)
        seen.append(checkpoints.steps())
    return seen


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
NOT_SEEN = FileNotFoundError(errno.ENOENT, "No such file or directory")


def fail_saves(
    layout: Layout, directory: Path, faults: Sequence[tuple[int, str, OSError]], asynchronous: bool
) -> list[tuple[str, list[str]]]:
    """Saves step 1, then, fault by fault, a step during which one rank's disk fails at `moment`, and at last one more.

    What each save said (nothing if it succeeded) and what it left.
    """
    rank, results = Rank(layout), []
    checkpoints = rank.checkpoints(directory, asynchronous=asynchronous)
    for step, (culprit, moment, broken) in enumerate([(-1, "", NO_SPACE), *faults, (-1, "", NO_SPACE)], start=1):
        with patch(moment, side_effect=broken) if rank.mesh.rank == culprit else nullcontext():
            said = rank.save(checkpoints, step)
        results.append((said, _names(directory)))
    return results


def lose_the_connection(layout: Layout, directory: Path) -> str:
    """What the training thread hears of an error in the writing thread that is none of a checkpoint's own."""
    rank = Rank(layout)
    checkpoints = rank.checkpoints(directory, asynchronous=True)
    with patch.object(Checkpoints, "_write", side_effect=RuntimeError("Connection closed by peer")):
        checkpoints.save(rank.engine, progress_at(1), rank.batches)
        try:
            return f"no error, but {checkpoints.outcome(wait=True)}"
        except RuntimeError as error:
            return str(error)


def follow_saves(layout: Layout, directory: Path) -> list[Any]:
    """What there is to hear before, during and after a save, of one whose predecessor stays, and of a failed load."""
    rank, gate, write = Rank(layout), threading.Event(), Checkpoints._write
    checkpoints = rank.checkpoints(directory, asynchronous=True, keep_last=1)

    def write_late(*arguments: Any) -> Saved:
        saved = write(*arguments)
        gate.wait()
        return saved

    heard: list[Any] = [checkpoints.outcome(wait=False)]
    begun = time.perf_counter()
    with patch.object(Checkpoints, "_write", write_late):
        checkpoints.save(rank.engine, progress_at(1), rank.batches)
        if rank.mesh.rank == 0:  # is done, and has to wait for the other
            gate.set()
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
        heard.append(checkpoints.outcome(wait=False))
        gate.set()
        saved = checkpoints.outcome(wait=True)
    assert saved is not None and 0 < saved.seconds < time.perf_counter() - begun
    heard += [saved.path, checkpoints.outcome(wait=True)]
    first = rank.mesh.rank == 0
    with patch.object(LocalStorage, "remove", side_effect=NO_SPACE) if first else nullcontext():
        checkpoints.save(rank.engine, progress_at(2), rank.batches)
        saved = checkpoints.outcome(wait=True)
    assert saved is not None and saved.complete
    heard.append(str(saved.error))
    mismatch = StateMismatch("another shape")
    with patch("parallel.state.LoadRectangles.create_local_plan", side_effect=mismatch) if not first else nullcontext():
        try:
            checkpoints.load_latest(rank.engine)
        except CheckpointError as error:
            heard.append(str(error))
    return heard


def cross_each_other() -> tuple[list[str], list[str]]:
    """What two threads hear over two groups, of which each rank asks the other one first."""
    groups, heard = {name: Ranks(name) for name in ("training", "writing")}, dict[str, list[str]]()

    def ask(name: str) -> None:
        heard[name] = groups[name].everywhere(lambda: name)

    first, second = groups if dist.get_rank() == 0 else reversed(groups)
    thread = threading.Thread(target=ask, args=(first,))
    thread.start()
    thread.join(0.2)  # for it to be the first
    ask(second)
    thread.join()
    return heard["training"], heard["writing"]


def look_at(directories: Sequence[Sequence[Path]]) -> list[str]:
    """What each rank says of directories of its own before it trains, where nothing may stay."""
    said = []
    for places in directories:
        place = places[dist.get_rank()]
        checkpoints = Checkpoints(storage_at(str(place)), keep_last=1, settings={})
        full = patch.object(LocalStorage, "create", lambda *_: open("/dev/full", "wb", 0))  # noqa: SIM115 (the caller closes it)
        try:
            with full if place.name == "full" else nullcontext():
                checkpoints.check_writable()
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
    return said


def resume(layout: Layout, attempts: Sequence[tuple[Path | str, str]]) -> list[str | int | None]:
    """What checkpoint.resume gives for each run directory: the step, None for a fresh start, or the refusal."""
    rank, got = Rank(layout), list[str | int | None]()
    for directory, wanted in attempts:
        job = layout.job()
        job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"resume": wanted})})
        try:
            resumed = resuming.resume(job, rank.checkpoints(directory), rank.engine)
            got.append(resumed.progress.step if resumed else None)
        except CheckpointError as error:
            got.append(str(error))
    return got


def _names(directory: Path) -> list[str]:
    """What every rank sees, once all are done with it."""
    dist.barrier()
    names = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    return names
