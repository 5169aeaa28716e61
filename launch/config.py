"""A job's configuration: all its sections, and the numbers derived from them.

Each key is described in its section in `launch.sections`, with the rules that join it to other keys. Whatever can be
known without a process group or a device is checked, so that a bad job dies on the login node, with all its faults in
one report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, model_validator

import launch.sections.model  # noqa: F401  its rules; the keys are in model.config
from launch.memory.parameters import count_parameters
from launch.precision import Precision, resolve_precision
from launch.sections.base import Section
from launch.sections.checkpoint import CheckpointSection
from launch.sections.data import DataSection
from launch.sections.health import HealthSection
from launch.sections.job import JobSection
from launch.sections.monitor import MonitorSection
from launch.sections.optimizer import OptimizerSection
from launch.sections.parallel import ParallelSection
from launch.sections.profile import ProfileSection
from launch.sections.slurm import SlurmSection
from launch.sections.training import TrainingSection, check_global_batch
from launch.settings.job_file import read_job
from launch.settings.rules import idle_keys, violations
from launch.settings.violations import ConfigError, Violation
from launch.settings.yaml_strict import write_yaml
from launch.weights.stored_model import RUN_FILE
from model.config import ModelConfig
from parallel.mesh import MeshShape
from parallel.sequence import check_sequence_parallel


class JobConfig(Section):
    """One job, complete and consistent. Derived numbers are methods and properties, never keys."""

    job: JobSection = Field(default_factory=JobSection)
    model: ModelConfig
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)
    profile: ProfileSection = Field(default_factory=ProfileSection)
    health: HealthSection = Field(default_factory=HealthSection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        found = violations(dict(self), broken=frozenset())
        if found:
            raise ConfigError("JobConfig", found)
        return self

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `to_yaml`: every key is there, and no other file is read. Raises ConfigError."""
        return cls.model_validate(read_job(SECTIONS, text, "configuration", resolved=True))

    @classmethod
    def of_run(cls, directory: Path) -> Self:
        """The job that a run directory keeps, resolved. Raises ConfigError."""
        path = directory / RUN_FILE
        text = _text(path, "give the directory of a run that has begun")
        return cls.model_validate(read_job(SECTIONS, text, str(path), resolved=True))

    def to_yaml(self) -> str:
        """Every key with its resolved value; `from_yaml` reads it back equal."""
        return write_yaml(self.model_dump(mode="json"))

    @property
    def run_path(self) -> Path:
        """Run directory, relative to the working directory unless configured absolute."""
        return Path(self.job.run_directory.replace("{name}", self.job.name))

    @property
    def checkpoint_location(self) -> str:
        """Where this run's checkpoints are: a path or a URL."""
        return self.checkpoint_location_from(self.run_path)

    def checkpoint_location_from(self, run: Path) -> str:
        """The same for a reader that finds the run directory at `run`."""
        directory = self.checkpoint.directory
        return directory.replace("{name}", self.job.name) if directory else str(run / "checkpoints")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, all ranks together."""
        return self.training.tokens_per_step

    @property
    def total_steps(self) -> int:
        """Optimizer steps until max_steps or max_tokens is reached, whichever comes first."""
        return self.training.total_steps

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model, without vocabulary padding."""
        return count_parameters(self.model)

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states are split over tensor-parallel ranks too."""
        size, configured = self.parallel.tensor_parallel_size, self.parallel.sequence_parallel
        if size == 1:
            return False
        if configured != "auto":
            return configured
        try:
            check_sequence_parallel(self.training.sequence_length, self.parallel.context_parallel_size, size)
        except ValueError:
            return False
        return True

    def compiles(self, device_type: str) -> bool:
        """Whether transformer blocks are compiled there."""
        if self.training.compile != "auto":
            return self.training.compile
        return device_type == "cuda" and self.training.mlp_tile_tokens is None

    def mesh_shape(self, world_size: int) -> MeshShape:
        """Sizes of the three axes. Raises ValueError where tp x cp does not divide `world_size`."""
        return MeshShape.fit(world_size, self.parallel.tensor_parallel_size, self.parallel.context_parallel_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one optimizer step. Raises ValueError where they do not come out whole."""
        data_parallel_size = self.mesh_shape(world_size).data_parallel_size
        check_global_batch(self.training.global_batch_size, self.training.micro_batch_size, data_parallel_size)
        return self.training.global_batch_size // (self.training.micro_batch_size * data_parallel_size)

    def idle_keys(self, world_size: int | None = None) -> list[str]:
        """A line for each key that was set and does nothing beside the others, with both values and a remedy."""
        return idle_keys(dict(self), world_size)

    def resolve_precision(self, device_type: str) -> Precision:
        """The precision that this job uses on "cpu" or "cuda"."""
        return resolve_precision(self.training.precision, device_type)


SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation
    for name, info in JobConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}
"""Name and type of every section, in the order of the reference."""


_LONGEST_FILE = 1_000_000
"""Characters of a job file. A data set given by mistake would keep the YAML reader busy for minutes."""


def load_job(path: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> JobConfig:
    """The job in the YAML file `path`, changed by `section.key=value` overrides, of which the last counts.

    With `world_size` (processes of the job) the rules that need it are checked too. Touches no process group and no
    device. Raises ConfigError with every violation of the file, the overrides and the rules.
    """
    text = _text(path, "check the path given to --config")
    return JobConfig.model_validate(read_job(SECTIONS, text, str(path), overrides, world_size))


def _text(path: Path, remedy: str) -> str:
    """Of a file that holds a job. Raises ConfigError, with `remedy` where there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST_FILE + 1)
        if len(text) <= _LONGEST_FILE:
            return text
        reason = f"has more than {_LONGEST_FILE:,} characters, which no job has; check the path given to --config"
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); {remedy}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    raise ConfigError(str(path), [Violation((), reason, place=str(path))])
