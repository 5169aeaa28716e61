"""What the ranks of the checkpoint tests do, and the full tensors that their parts make."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from launch.build import build_engine
from launch.checkpoint import CheckpointError, Checkpoints, Progress
from launch.config import JobConfig
from launch.corpus import Corpus
from launch.data import Batches, SequenceSampler
from launch.monitor import SilentMonitor
from launch.run import _resume
from launch.trainer import Trainer
from parallel.mesh import ParallelMesh

VOCABULARY, LENGTH, GLOBAL_BATCH, SAVED_AT, END = 61, 16, 4, 2, 4
FINGERPRINT = "0123456789abcdef"


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


@dataclass(frozen=True)
class LocalParameter:
    """One parameter on one rank: the fp32 state it holds, and the copy it computes with."""

    local_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    dim: int | None
    start: int | None
    """Of the flat range of the local tensor that this rank keeps; None where it keeps nothing."""
    state: dict[str, np.ndarray]
    working: np.ndarray


@dataclass(frozen=True)
class RankState:
    tp_rank: int
    step_count: int
    loss_scaler: dict[str, float]
    parameters: dict[str, LocalParameter]


class Rank:
    """One rank with its engine, training on a corpus of random tokens."""

    def __init__(self, layout: Layout):
        job = layout.job()
        self.mesh = ParallelMesh.create(job.mesh_shape(dist.get_world_size()))
        self.engine, _ = build_engine(job, self.mesh, torch.device("cpu"))
        self.model = job.model.model_dump(mode="json", exclude={"attention_backend"})
        tokens = np.random.default_rng(3).integers(0, VOCABULARY, 2000).astype(np.uint8)
        batches = Batches(
            SequenceSampler(Corpus.from_documents("training", tokens, [len(tokens)], FINGERPRINT), LENGTH, seed=0),
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=1,
            data_parallel_size=self.mesh.dp_size,
            dp_rank=self.mesh.dp_rank,
        )
        self.trainer = Trainer(job, self.mesh, self.engine, batches, Mock(), SilentMonitor(), Mock(), {})

    def checkpoints(self, directory: Path, *, keep_last: int = 3, **changes: Any) -> Checkpoints:
        stored = {"model": self.model, "data_fingerprint": FINGERPRINT} | changes
        return Checkpoints(directory, keep_last=keep_last, **stored)

    def train(self, first: int, stop: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of the steps."""
        outcomes = [self.trainer.train_step(step, self.trainer._load(step)) for step in range(first, stop)]
        return [(float(outcome.loss), float(outcome.grad_norm)) for outcome in outcomes]

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
    """An uninterrupted run of one rank, saved at SAVED_AT."""

    saved: RankState
    numbers: list[tuple[float, float]]
    ended: RankState


def write(layouts: Sequence[Layout], folder: Path) -> list[Written]:
    """Trains each layout to END and saves it on the way, under folder/LAYOUT."""
    written = []
    for layout in layouts:
        rank = Rank(layout)
        rank.train(0, SAVED_AT)
        saved = rank.state()
        rank.checkpoints(folder / str(layout)).save(rank.engine, progress_at(SAVED_AT))
        written.append(Written(saved, rank.train(SAVED_AT, END), rank.state()))
    return written


@dataclass(frozen=True)
class Read:
    """What one rank got from a checkpoint, and how it trained on, if it did."""

    progress: Progress | None
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
            progress = rank.checkpoints(directory).load_latest(rank.engine)
            loaded = rank.state()
            numbers = rank.train(SAVED_AT, END) if position < 2 else []
            reads.append(Read(progress, loaded, numbers, rank.state() if position == 0 else None))
        results.append(reads)
    return results


def refusals(layout: Layout, attempts: Sequence[tuple[Path, dict[str, Any]]]) -> list[str | None]:
    """What `load_latest` says to each directory, under the given changes to model or fingerprint; None if it loads."""
    rank, said = Rank(layout), list[str | None]()
    for directory, changes in attempts:
        stored = changes | {"model": rank.model | changes.get("model", {})}
        try:
            rank.checkpoints(directory, **stored).load_latest(rank.engine)
            said.append(None)
        except CheckpointError as error:
            said.append(str(error))
    return said


def save_often(layout: Layout, directory: Path, steps: Sequence[int], keep_last: int) -> list[list[str]]:
    """Trains and saves at each step; what the directory holds after each save."""
    rank, seen = Rank(layout), []
    checkpoints = rank.checkpoints(directory, keep_last=keep_last)
    for step in steps:
        rank.train(0, 1)
        checkpoints.save(rank.engine, progress_at(step))
        seen.append(_names(directory))
    return seen


def fail_saves(layout: Layout, directory: Path, faults: Sequence[tuple[int, str]]) -> list[tuple[str, list[str]]]:
    """Saves step 1, then, fault by fault, a step during which one rank's disk fails at `moment`, and at last one more.

    What each save said (nothing if it succeeded) and what it left.
    """
    rank, results = Rank(layout), []
    checkpoints = rank.checkpoints(directory)
    for step, (culprit, moment) in enumerate([(-1, ""), *faults, (-1, "")], start=1):
        broken = OSError(errno.ENOSPC, "No space left on device")
        said = ""
        with patch(moment, side_effect=broken) if rank.mesh.rank == culprit else nullcontext():
            try:
                checkpoints.save(rank.engine, progress_at(step))
            except CheckpointError as error:
                said = str(error)
        results.append((said, _names(directory)))
    return results


def resume(layout: Layout, attempts: Sequence[tuple[Path, str]]) -> list[str | int | None]:
    """What checkpoint.resume gives for each run directory: the step, None for a fresh start, or the refusal."""
    rank, got = Rank(layout), list[str | int | None]()
    for directory, wanted in attempts:
        job = layout.job()
        job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"resume": wanted})})
        try:
            progress = _resume(job, rank.checkpoints(directory), rank.engine)
            got.append(progress.step if progress else None)
        except CheckpointError as error:
            got.append(str(error))
    return got


def _names(directory: Path) -> list[str]:
    """What every rank sees, once all are done with it."""
    dist.barrier()
    names = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    return names


def assemble(ranks: Sequence[RankState]) -> dict[str, np.ndarray]:
    """KIND/NAME -> the full tensor, by concatenation alone; every element must be kept by exactly one rank."""
    full: dict[str, np.ndarray] = {}
    tp_size = max(rank.tp_rank for rank in ranks) + 1
    for name, one in ranks[0].parameters.items():
        for kind in ("parameter", "exp_avg", "exp_avg_sq"):
            slices = []
            for tp_rank in range(tp_size):
                flat = np.full(np.prod(one.local_shape), np.nan, dtype=np.float32)
                for part in (rank.parameters[name] for rank in ranks if rank.tp_rank == tp_rank):
                    if part.start is not None:
                        target = flat[part.start : part.start + part.state[kind].size]
                        assert np.isnan(target).all(), f"{kind} of {name} is kept twice"
                        target[:] = part.state[kind]
                assert not np.isnan(flat).any(), f"{kind} of {name} is kept by nobody in part"
                slices.append(flat.reshape(one.local_shape))
            if one.dim is None:
                assert all(np.array_equal(slices[0], other) for other in slices), f"{kind} of {name} differs over tp"
                whole = slices[0]
            else:
                whole = np.concatenate(slices, axis=one.dim)
                real, padding = np.split(whole, [one.full_shape[one.dim]], axis=one.dim)
                assert not padding.any(), f"{kind} of {name}: the vocabulary's padding is not zero"
                whole = real
            assert whole.shape == one.full_shape
            full[f"{kind}/{name}"] = whole
    return full


def check_working_copies(ranks: Sequence[RankState], precision: str, stage: int) -> None:
    """What computes is the fp32 state, rounded to the precision that computes."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision if stage else "fp32", torch.float32)
    full = assemble(ranks)
    for rank in ranks:
        for name, local in rank.parameters.items():
            master = full[f"parameter/{name}"]
            if local.dim is not None:
                width = local.local_shape[local.dim]
                master = np.take(
                    master,
                    range(rank.tp_rank * width, min((rank.tp_rank + 1) * width, master.shape[local.dim])),
                    axis=local.dim,
                )
                missing = [(0, size - have) for size, have in zip(local.local_shape, master.shape, strict=True)]
                master = np.pad(master, missing)
            rounded = torch.from_numpy(np.ascontiguousarray(master)).to(dtype).float().numpy()
            assert np.array_equal(local.working, rounded), f"{name} does not compute with its fp32 state"
