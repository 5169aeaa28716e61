"""The types that a job computes in: their names, what they are to torch, and what `auto` stands for."""

from __future__ import annotations

from typing import Literal

import torch

from parallel.zero_config import Precision as Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES: dict[Precision, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
"""Of one number."""


def resolve_precision(configured: Precision | Literal["auto"], device_type: str) -> Precision:
    """The precision itself; for auto that of "cpu" or "cuda"."""
    if configured != "auto":
        return configured
    return "bf16" if device_type == "cuda" else "fp32"
