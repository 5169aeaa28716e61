"""Finds rank and world size in a Slurm step whose ranks `srun` started itself, one task each. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping


def world_of_step(variables: Mapping[str, str]) -> dict[str, str] | None:
    """What a launcher would have set, from what srun has; None outside of a step of several tasks.

    MASTER_ADDR and MASTER_PORT stay as they are where the user has set them.
    """
    if "SLURM_STEP_ID" not in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    job, restart = int(variables["SLURM_JOB_ID"]), int(variables.get("SLURM_RESTART_COUNT", "0"))
    met_at = {
        "MASTER_ADDR": first_host(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(meeting_port(job, restart + int(variables["SLURM_STEP_ID"]))),
    }
    return {
        "RANK": variables["SLURM_PROCID"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_SIZE": str(
            tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])[int(variables.get("SLURM_NODEID", "0"))]
        ),
        **{name: variables.get(name, value) for name, value in met_at.items()},
    }


def meeting_port(job_id: int, start: int) -> int:
    """A port for the ranks to meet at, below those that the kernel gives away: no two jobs of a node share one."""
    return 12000 + (job_id * 8 + start % 8) % 20000


def first_host(nodes: str) -> str:
    """The first name of Slurm's shorthand: `node[07-12,20],other` -> `node07`."""
    first = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    assert first is not None
    return "".join(part or "" for part in first.groups())


def tasks_per_node(counts: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    found = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        found += [int(count)] * int(times or 1)
    return found
