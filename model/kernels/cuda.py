"""What the CUDA kernels ask of the machine before they say they can run."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def missing_gpu(compute_capabilities: tuple[int, ...]) -> str | None:
    """Why no visible NVIDIA GPU has one of these major compute capabilities; None if the current one has."""
    if torch.version.cuda is None:
        return f"needs a CUDA build of torch, this one ({torch.__version__}) has none"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, torch sees none"
    major, minor = torch.cuda.get_device_capability()
    if major not in compute_capabilities:
        wanted = ", ".join(f"{x}.x" for x in compute_capabilities)
        return f"needs compute capability {wanted}; {torch.cuda.get_device_name()} has {major}.{minor}"
    return None


def import_or_reason(module: str, remedy: str) -> tuple[ModuleType | None, str]:
    """The imported module, or None and why: absent, or present and failing with its own words."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a compiled extension may raise anything; the reader gets all of it
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return None, f"needs {module}, which is not installed; {remedy}"
        return None, f"has {module}, but importing it failed ({type(error).__name__}: {error}); {remedy}"
