"""Section `slurm`, and the rule that is about it."""

from __future__ import annotations

import re
import shlex
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from launch.sections.base import ListOf, Section
from launch.settings.rules import Job, idle, rule
from launch.user_path import UserPath

Word = Annotated[str, Field(pattern=r"^\S+$")]
"""What stands on one `#SBATCH` line without blanks."""

Line = Annotated[str, Field(pattern=r"^[^\n]+$")]

SbatchOption = Annotated[str, Field(pattern=r"^-[^\n]+$")]
SrunOption = Annotated[str, Field(pattern=r"^-[^\s=]+(=[^\n]*)?$")]
"""One argument: srun would take what follows a blank, or a word without dashes, for the command to run."""


def _in_minutes(value: object) -> object:
    return str(value) if type(value) is int else value


class SlurmSection(Section):
    """What to request from Slurm (docs/slurm.md)."""

    nodes: int = Field(default=1, ge=1, le=1_000_000)
    """Nodes of the job."""
    gpus_per_node: int = Field(default=8, ge=1, le=1_000_000)
    """GPUs of each node, one process each. With job.device: cpu, processes of each node."""
    gres: Word | None = "gpu"
    """Slurm's generic resource for a GPU, such as gpu or gpu:h100. null requests none, as job.device: cpu does."""
    partition: Word | None = None
    """Partition to submit to; null takes the cluster's default."""
    account: Word | None = None
    """Account to charge."""
    qos: Word | None = None
    """Quality of service."""
    reservation: Word | None = None
    """Reservation to run in."""
    time: Annotated[str | None, BeforeValidator(_in_minutes)] = Field(
        default=None, pattern=r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})$"
    )
    """Time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    constraint: Word | None = None
    """Node features to require."""
    exclude: Word | None = None
    """Nodes to keep away from, such as node[3,7-9]."""
    exclusive: bool = True
    """Take whole nodes, with all their CPUs and memory."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """CPUs of each node; null takes all that Slurm gives. Without exclusive that may be a single CPU for all
    processes."""
    memory: Word | None = None
    """Memory of each node, such as 500G; null takes the cluster's default, or all of it with exclusive."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str | int] = Field(
        default_factory=dict
    )
    """Variables that every process gets, such as NCCL_SOCKET_IFNAME: ib0."""
    modules: ListOf[Word] = ()
    """Loaded by `module load` before anything else."""
    setup: ListOf[Line] = ()
    """Lines of bash that run on the first node before the job starts."""
    python: str | None = Field(default=None, min_length=1)
    """Interpreter on the nodes; null is the one that submits."""
    container: Line | None = None
    """Words before the command of each node, such as apptainer exec --nv image.sif. Options of srun itself go into
    srun_options."""
    sbatch_options: ListOf[SbatchOption] = ()
    """More `#SBATCH` lines, such as --mail-type=END."""
    srun_options: ListOf[SrunOption] = ()
    """More options of srun, one each, such as --container-image=image.sqsh."""
    template: UserPath | None = None
    """File to render in place of the built-in job script; it holds {directives}, {setup} and {command}."""
    stop_seconds: int = Field(default=120, ge=1)
    """Seconds before the time limit at which the job is told to save and end."""
    max_restarts: int = Field(default=20, ge=0)
    """How many times a stopped job is queued again."""
    max_idle_slices: int = Field(default=2, ge=1)
    """A job is not queued again after this many starts in a row from the same step."""

    @property
    def processes(self) -> int:
        """Those of the whole job."""
        return self.nodes * self.gpus_per_node

    @field_validator("sbatch_options")
    @classmethod
    def _nodes_have_a_key(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if re.match(r"(-N|-n|--nodes\b|--ntasks)", option):
                raise ValueError(
                    f"{option} is another size than the one that the job is checked on; set slurm.nodes and "
                    "slurm.gpus_per_node instead"
                )
        return options

    @field_validator("gres")
    @classmethod
    def _gpus_have_a_key(cls, value: str | None) -> str | None:
        counted = re.fullmatch(r"(.+):(\d{1,2})", value or "")
        if counted:
            raise ValueError(
                f"{value} has a number already, and gpus_per_node is put after it; give {counted[1]}, and set "
                f"slurm.gpus_per_node={counted[2]}"
            )
        return value

    @field_validator("container")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        try:
            shlex.split(value or "")
        except ValueError as error:
            raise ValueError(f"{str(error).lower()}; quote words as in a shell") from None
        return value


def slurm_seconds(limit: str) -> int:
    """Seconds of a time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@rule("slurm.stop_seconds", "slurm.time")
def _a_slice_has_time_to_train(job: Job) -> None:
    if job.slurm.time is None:
        return
    limit, lead = slurm_seconds(job.slurm.time), job.slurm.stop_seconds
    if 0 < limit <= lead:
        raise ValueError(
            f"stop_seconds ({lead}) must be less than the time limit ({job.slurm.time}, {limit} s), or the job is told "
            "to stop as it starts; raise slurm.time or lower slurm.stop_seconds"
        )


@idle("slurm.gres")
def _no_gpu_is_asked_for(job: Job) -> str | None:
    if job.job.device == "cpu" and job.slurm.gres is not None:
        return f"job.device ({job.job.device}) asks for no GPU; set job.device=auto, or leave this out"
    return None


@idle("slurm.max_idle_slices")
def _no_job_is_queued_again(job: Job) -> str | None:
    restarts = job.slurm.max_restarts
    if restarts == 0:
        return f"max_restarts ({restarts}) queues no job again; raise that, or leave this out"
    return None
