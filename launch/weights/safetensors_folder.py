"""A folder of safetensors files: one model's tensors, in one file or in shards with an index, as transformers lays it
out. Reading and writing take one tensor, or a slice of one, at a time.

    model.safetensors                                        everything, or
    model-00001-of-00003.safetensors ...                     shards, and
    model.safetensors.index.json                             which tensor is in which
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from launch.weights.stored_model import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2 << 30
"""Size of a shard, and so of what writing holds in memory, unless one tensor is larger."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafetensorsFolder:
    """The tensors of a folder, by the names they have there. Only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path):
        """Raises WeightsError where there are no safetensors files, or one that the index names is missing or cut."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in _files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (not a dict)
                        header = opened.get_slice(name)
                        self._add(name, file, tuple(header.get_shape()), header.get_dtype())
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file} cannot be read ({error}); it is cut or damaged, get it again") from error
        self._check_index()

    def read(self, name: str, offsets: Sequence[int], target: Tensor) -> None:
        """Fills `target` with the rectangle of tensor `name` that begins at `offsets`, in the target's dtype."""
        rectangle = tuple(slice(o, o + n) for o, n in zip(offsets, target.shape, strict=True))
        with safe_open(self._files[name], framework="pt") as opened:
            target.detach().copy_(opened.get_slice(name)[rectangle])

    def _add(self, name: str, file: Path, shape: tuple[int, ...], dtype: str) -> None:
        if dtype not in _DTYPES:
            raise WeightsError(
                f"{file}: tensor {name} is {dtype}; only {', '.join(_DTYPES)} are read: save the model in bf16 first"
            )
        self._files[name], self.shapes[name], self.dtypes[name] = file, shape, _DTYPES[dtype]

    def _check_index(self) -> None:
        if (self.folder / INDEX).exists():
            missing = [name for name in _weight_map(self.folder) if name not in self._files]
            if missing:
                raise WeightsError(
                    f"{self.folder / INDEX} promises {len(missing)} tensors that no shard holds, such as {missing[0]}; "
                    "the shards are of another download, get the folder again"
                )


class ShardWriter:
    """Writes tensors into shards of at most `shard_bytes`; call `finish` after the last, or nothing is complete."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a contiguous tensor on the CPU; it must not change before its shard is written."""
        held = sum(part.nbytes for part in self._pending.values())
        if self._pending and held + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Writes the last shard and the index, and gives shards their final names."""
        self._flush()
        count = len(self._shards)
        final = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        for number, name in enumerate(final):
            self._temporary(number).rename(self._folder / name)
        if count > 1:
            places = {name: file for names, file in zip(self._shards, final, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        path = self._temporary(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(self._folder.stat().st_mode & 0o666)  # safetensors lets the owner alone read it
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self._shards.append(list(self._pending))
        self._pending = {}

    def _temporary(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors.partial"


def _files(folder: Path) -> list[Path]:
    """The files that hold the tensors."""
    if (folder / INDEX).exists():
        files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"{folder} lacks {len(missing)} of {len(files)} shards that its index names: {', '.join(missing[:4])}; "
                "download them again"
            )
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")):
        raise WeightsError(
            f"{folder} holds pickled weights (*.bin), which could run code when read; save them as safetensors first, "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}; give the folder of a downloaded model")


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        return {
            str(tensor): str(file) for tensor, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder / INDEX} cannot be read ({error!r}); download it again") from error
