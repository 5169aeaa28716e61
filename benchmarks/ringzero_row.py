"""This project on a row's job: its own engine and steps, without the trainer around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from launch.build import build_engine
from launch.config import JobConfig
from launch.data.batches import Batches
from launch.memory.recompute_plan import planned_footprint
from launch.stepper import Stepper
from parallel.mesh import ParallelMesh
from parallel.zero import initialize_distributed
from workload import random_batches, record, timed_steps


def measure(job: JobConfig, steps: int, device: torch.device) -> dict[str, Any]:
    """One row, on every rank of its world."""
    train_step, note = prepared(job, steps, device, partial(random_batches, job))
    found = record(job, timed_steps(train_step, steps))
    estimate = planned_footprint(job, job.mesh_shape(dist.get_world_size()), device.type).peak
    return found | {"attention": note, "estimated_gib": estimate / 2**30}


def prepared(
    job: JobConfig, steps: int, device: torch.device, batches_of: Callable[[int, int], Batches]
) -> tuple[Callable[[int], tuple[float, float]], str]:
    """A function from a step's number to its loss and gradient norm, with the data of all `steps` made and cut
    beforehand; and the sentence on attention. `batches_of(dp_size, dp_rank)` says what a rank reads."""
    initialize_distributed(device.type)
    mesh = ParallelMesh.create(job.mesh_shape(dist.get_world_size()))
    engine, note = build_engine(job, mesh, device)
    batches = batches_of(mesh.dp_size, mesh.dp_rank)
    stepper = Stepper(job, mesh, engine)
    made = [stepper.cut(batches.micro_batches(step)) for step in range(steps)]

    def train_step(step: int) -> tuple[float, float]:
        outcome = stepper.train(step, made[step])
        return outcome.loss, outcome.grad_norm

    return train_step, note
