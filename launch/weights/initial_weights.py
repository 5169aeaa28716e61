"""Starts a run from stored weights instead of random ones: `model.init_from`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from launch.agreement import raised_on_all_ranks
from launch.config import JobConfig
from launch.run_lock import RunDirectoryError, writing_into
from launch.weights.reader import Part, open_weights
from launch.weights.stored_model import COMPANION_FOLDER, WeightsError
from launch.weights.suitability import notes_on
from parallel.state import rectangles
from parallel.tensor import TensorShard
from parallel.zero import ZeroEngine
from parallel.zero_state import StateFragment


def load_initial_weights(job: JobConfig, engine: ZeroEngine) -> str:
    """Fills `engine` with the weights that model.init_from names; returns a line for the log. Collective.

    The tokenizer files beside the weights are copied into the run directory. Raises WeightsError and RunDirectoryError,
    each on every rank.
    """
    assert job.model.init_from is not None
    folder = Path(job.model.init_from)
    origin = read_weights(engine.fragments(), engine.shards, folder)
    engine.adopt_state(step_count=0)
    with raised_on_all_ranks(RunDirectoryError):
        if dist.get_rank() == 0 and (folder / COMPANION_FOLDER).is_dir():
            _copy_companions(folder / COMPANION_FOLDER, job.run_path)
    return f"weights of {origin}{notes_on(job, folder)}"


def _copy_companions(folder: Path, run: Path) -> None:
    """Contents only: read-only copies could not be replaced by a second start. Raises RunDirectoryError."""
    with writing_into(run):
        (run / COMPANION_FOLDER).mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            shutil.copyfile(file, run / COMPANION_FOLDER / file.name)


def read_weights(
    fragments: Iterable[StateFragment], shards: Mapping[str, TensorShard], folder: Path, step: int | None = None
) -> str:
    """Fills the parameters of `fragments` from a run or a converted model; returns where they lay. Collective.

    Every rank reads the rectangles that ZeRO and tensor parallelism leave to it, and no others. Raises WeightsError on
    every rank if any rank fails.
    """
    parts = [part for fragment in fragments for part in _parts(fragment, shards[fragment.name])]
    with raised_on_all_ranks(WeightsError):
        try:
            weights = open_weights(folder, step)
            weights.read(parts)
        except (WeightsError, OSError) as error:
            raise WeightsError(f"rank {dist.get_rank()}: {error}") from error
    return weights.origin


def _parts(fragment: StateFragment, shard: TensorShard) -> list[Part]:
    """What the fragment holds of the parameter itself, without the optimizer's moments."""
    weight = replace(fragment, tensors={"parameter": fragment.tensors["parameter"]})
    return [Part(fragment.name, found.offsets, found.tensor) for found in rectangles(weight, shard)]
