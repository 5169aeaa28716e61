"""The types that a job computes in: their names, their torch dtypes, and what `auto` stands for."""

from __future__ import annotations

from typing import Literal

import torch

from parallel.zero_config import Precision as Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES: dict[Precision, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
"""Of one number."""


def check_precision(precision: Precision, device_type: str) -> None:
    """Raises ValueError where a job cannot train in `precision` on "cpu" or "cuda"."""
    if precision == "fp16" and device_type == "cpu":
        raise ValueError("precision is fp16, which DeepSpeed trains on GPUs only; set training.precision=bf16 or fp32")


def resolve_precision(configured: Precision | Literal["auto"], device_type: str) -> Precision:
    """The precision itself; for auto that of "cpu" or "cuda"."""
    if configured != "auto":
        return configured
    return "bf16" if device_type == "cuda" else "fp32"
