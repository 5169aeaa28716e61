"""Reads the weights of a run or of a converted model by rectangles, so that no reader needs the whole."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from launch.config import JobConfig
from launch.saving.checkpoint_names import CheckpointError, newest_checkpoint
from launch.saving.manifest import CheckpointFiles
from launch.saving.storage import Storage, storage_at
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.stored_model import MODEL_FILE, WeightsError, check_shapes, parameter_shapes, stored_model
from parallel.state import LoadRectangles, Rectangle
from parallel.torch_files import reader


class Part(NamedTuple):
    """A rectangle of a parameter, and the memory that wants it (any dtype, any device)."""

    name: str
    offsets: tuple[int, ...]
    tensor: Tensor


class Weights(ABC):
    """One model's parameters, by our names."""

    origin: str
    """Their name in errors."""
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @abstractmethod
    def read(self, parts: Sequence[Part]) -> None:
        """Fills the parts. Raises WeightsError."""


def open_weights(folder: Path, step: int | None = None, *, verify: bool = False) -> Weights:
    """The weights of a run (of its newest checkpoint, or of the one at `step`) or of a converted model.

    `verify` compares a checkpoint's checksums first, which reads all of it.

    Raises WeightsError if there are none, or not those that the folder's own description promises.
    """
    model = stored_model(folder)
    weights: Weights
    if (folder / MODEL_FILE).exists():
        weights = _ConvertedWeights(folder)
    else:
        try:
            storage = storage_at(JobConfig.of_run(folder).checkpoint_location_from(folder))
            weights = _CheckpointWeights(storage, newest_checkpoint(storage, step, verify=verify))
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
    check_shapes(weights.shapes, parameter_shapes(model), weights.origin)
    return weights


class _ConvertedWeights(Weights):
    def __init__(self, folder: Path):
        self.origin, self._files = str(folder), SafetensorsFolder(folder)
        self.shapes, self.dtypes = self._files.shapes, self._files.dtypes

    def read(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._files.read(part.name, part.offsets, part.tensor)


class _CheckpointWeights(Weights):
    """The fp32 parameters of a checkpoint, without the optimizer's moments."""

    def __init__(self, storage: Storage, name: str):
        self.origin, self._reader = f"{storage.location}/{name}", reader(CheckpointFiles(storage, name))
        # torch asks again at every read, and that of a run on many ranks is long.
        self._reader.read_metadata = functools.cache(self._reader.read_metadata)  # type: ignore[method-assign]
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for key, entry in self._reader.read_metadata().state_dict_metadata.items():
            kind, name = key.split("/", 1)
            if kind == "parameter" and isinstance(entry, TensorStorageMetadata):
                shapes[name], dtypes[name] = tuple(entry.size), entry.properties.dtype
        self.shapes, self.dtypes = shapes, dtypes

    def read(self, parts: Sequence[Part]) -> None:
        rectangles = [
            Rectangle(f"parameter/{part.name}", self.shapes[part.name], part.offsets, part.tensor) for part in parts
        ]
        try:
            with warnings.catch_warnings():  # every reader is alone here, on purpose
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
                load({}, storage_reader=self._reader, planner=LoadRectangles(rectangles), no_dist=True)
        except CheckpointException as error:
            reason = "; ".join(str(failure[0]) for failure in error.failures.values())  # without torch's traceback
            raise WeightsError(f"{self.origin} could not be read: {reason}") from error
