"""Renders a job's `slurm` section as the script that sbatch reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.config import JobConfig

TEMPLATE = """\
#!/bin/bash
{directives}

trap '' USR2  # Slurm's warning, which would kill this shell before it becomes what hears it
{setup}

# Starts one launcher on each node and stays: hears signals, queues the job again.
exec {command} "$@"
"""
_PLACES = ("directives", "setup", "command")


def render(job: JobConfig, *, folder: Path, working_directory: Path, command: Sequence[str]) -> str:
    """The script; its log goes to `folder`. Raises ValueError where slurm.template cannot be read or lacks a place."""
    parts = {
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(job, folder, working_directory)),
        "setup": "\n".join(_setup(job)),
        "command": shlex.join(command),
    }
    template = TEMPLATE if job.slurm.template is None else _read(job.slurm.template)
    # Other braces belong to bash.
    return re.sub(rf"\{{({'|'.join(_PLACES)})\}}", lambda match: parts[match[1]], template)


def directives(job: JobConfig, folder: Path, working_directory: Path) -> list[str]:
    """The options of sbatch, most telling first. What slurm.sbatch_options repeats counts as it says there."""
    slurm = job.slurm
    options: dict[str, object] = {
        "job-name": job.job.name,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "gres": gpu_request(job),
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory or (0 if slurm.exclusive else None),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "signal": f"B:USR2@{slurm.stop_seconds}",
        "chdir": working_directory,
        "output": f"{str(folder).replace('%', '%%')}/job-%j.log",
        "open-mode": "append",
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*lines, "--requeue", *["--exclusive"] * slurm.exclusive, *slurm.sbatch_options]


def gpu_request(job: JobConfig) -> str | None:
    """The generic resources of each node, or None."""
    if job.slurm.gres is None or job.job.device == "cpu":
        return None
    return f"{job.slurm.gres}:{job.slurm.gpus_per_node}"


def _setup(job: JobConfig) -> list[str]:
    slurm = job.slurm
    return [
        *(f"module load {shlex.quote(module)}" for module in slurm.modules),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in slurm.environment.items()),
        *slurm.setup,
    ]


def _read(path: str) -> str:
    try:
        template = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"slurm.template {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"slurm.template {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    missing = [place for place in _PLACES if f"{{{place}}}" not in template]
    if missing:
        raise ValueError(
            f"slurm.template {path} lacks {', '.join(f'{{{place}}}' for place in missing)}; it needs all of "
            f"{', '.join(f'{{{place}}}' for place in _PLACES)}"
        )
    return template
