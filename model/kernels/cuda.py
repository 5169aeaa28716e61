"""What the CUDA kernels need of the machine before they report that they can run."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from types import ModuleType

import torch

from model.kernels.banded import BandedKernel


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


class PackagedKernel(BandedKernel):
    """A kernel of a package that may not be there, for GPUs of some compute capabilities."""

    compute_capabilities: tuple[int, ...]
    """The major ones."""

    @staticmethod
    @abstractmethod
    def load() -> tuple[ModuleType | None, str]:
        """The package, or None and why it does not serve; remembered, since importing it may take seconds."""

    @property
    def package(self) -> ModuleType:
        """The package of a kernel that is available."""
        package, why = self.load()
        assert package is not None, why
        return package

    def availability(self) -> str | None:
        missing = missing_gpu(self.compute_capabilities)
        if missing is not None:
            return missing
        package, why = self.load()
        return why if package is None else None
