"""Section `job`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launch.sections.base import Section
from launch.user_path import UserPath


class JobSection(Section):
    """What the run is called and where it runs."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: letters, digits, dots, dashes and underscores."""
    run_directory: UserPath = "runs/{name}"
    """Where checkpoints, events and the resolved configuration go, relative to the working directory; {name}
    stands for job.name."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds initialisation and the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs when every process of the node can have one, else the CPU."""
