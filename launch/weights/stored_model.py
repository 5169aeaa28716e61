"""Recognises whose weights a folder holds: a run's, by its config.yaml, or a converted model's, by its model.yaml.

RUN/config.yaml  checkpoints/        a run
OUT/model.yaml   *.safetensors       a model that `launch/convert.py from-hf` wrote, tensors under our names
*/hugging_face/                      what it was converted from: config.json, tokenizer, generation config
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from launch.settings.violations import dotted, kept_by_a_run, section_violations
from launch.settings.yaml_strict import read_yaml, write_yaml
from model.attention import kernel_attention
from model.config import JOB_KEYS, ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS

RUN_FILE = "config.yaml"
MODEL_FILE = "model.yaml"
COMPANION_FOLDER = "hugging_face"


class WeightsError(ValueError):
    """Weights that cannot be read or written, or are not this model's; the message says which and what to do."""


def stored_keys(folder: Path) -> dict[str, Any]:
    """The `model` section that belongs to the weights in `folder`, without what only concerns a job.

    Raises WeightsError where the folder is neither a run nor a converted model.
    """
    for name in (MODEL_FILE, RUN_FILE):
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise WeightsError(f"{folder / name} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise WeightsError(f"{folder / name} is not UTF-8 text (byte {error.start}); restore it") from error
        document = read_yaml(text).value
        section = document.get("model") if isinstance(document, dict) else None
        if not isinstance(section, dict):
            raise WeightsError(f"{folder / name} has no model section; the file was changed, restore it")
        return {key: value for key, value in section.items() if key not in JOB_KEYS}
    if (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder} is a Hugging Face folder; convert it once: python launch/convert.py from-hf {folder} NEW_FOLDER"
        )
    raise WeightsError(
        f"{folder} is neither a run ({RUN_FILE}) nor a converted model ({MODEL_FILE}); check the path, or convert a "
        "model with python launch/convert.py from-hf"
    )


def stored_model(folder: Path) -> ModelConfig:
    """The network whose weights are in `folder`. Raises WeightsError."""
    try:
        return ModelConfig.model_validate(stored_keys(folder))
    except ValidationError as error:
        file = folder / (MODEL_FILE if (folder / MODEL_FILE).is_file() else RUN_FILE)
        faults = section_violations("model", ModelConfig, error, {"model": ModelConfig})
        told = "; ".join(f"{dotted(fault.path)}: {fault.message}" for fault in map(kept_by_a_run, faults))
        raise WeightsError(f"the model section of {file} is not valid: {told}") from error


def write_model(folder: Path, model: ModelConfig) -> None:
    """The inverse of `stored_model`, for a converted model."""
    section = model.model_dump(mode="json", exclude=set(JOB_KEYS))
    (folder / MODEL_FILE).write_text(write_yaml({"model": section}), encoding="utf-8")


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order; a tied head has none of its own."""
    with torch.device("meta"):
        network = GPT(model, kernel_attention(KERNELS["math"], model))
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises WeightsError unless `found` has every wanted tensor in its shape, and no other."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise WeightsError(
            f"{origin} lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}; its description is another "
            "model's, or a file is missing"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise WeightsError(
                f"{origin}: {name} is {list(found[name])}, but its description makes it {list(shape)}; the two do not "
                "belong together, get both again"
            )
    surplus = [name for name in found if name not in wanted]
    if surplus:
        raise WeightsError(
            f"{origin} holds {len(surplus)} tensors that the model has not, such as {surplus[0]}: it is another network"
        )
