"""Building and stepping an engine says nothing: what the user reads is the job's own log, and real warnings."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from launch.build import build_engine
from launch.warning_filters import ignore_warnings_of_dependencies
from parallel.mesh import ParallelMesh
from tests.distributed.harness import run_distributed
from tests.distributed.two_rank_jobs import LENGTH, job_of, one_step


def build_and_step() -> None:
    ignore_warnings_of_dependencies()
    for stage in (0, 1, 3):
        job = job_of(2, 1, stage, "bf16")
        engine, _ = build_engine(job, ParallelMesh.create(job.mesh_shape(dist.get_world_size())), torch.device("cpu"))
        one_step(engine, LENGTH)
        engine.engine.destroy()


def test_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    run_distributed(build_and_step, 2)
    said = capfd.readouterr()
    assert said.out + said.err == ""
