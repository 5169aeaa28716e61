"""Evaluation on a GPU, whole and gathered unit by unit, against the plain model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.config import load_job
from launch.inference.evaluation import evaluated
from parallel.mesh import ParallelMesh
from tests.distributed.evaluation_twin import expected, to_evaluate
from tests.distributed.harness import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def evaluate(folder: Path) -> list[dict[str, Any]]:
    """At stage 0 and stage 3."""
    found = []
    for stage in (0, 3):
        keys = ["training.precision=fp32", "training.compile=false", f"parallel.zero_stage={stage}"]
        job = load_job(folder / "job.yaml", [f"model.init_from={folder}", *keys])
        found.append(evaluated(job, None, ParallelMesh.create(job.mesh_shape(1)), torch.device("cuda", 0)))
    return found


def test_the_loss_is_the_plain_models(tmp_path: Path) -> None:
    tokens = expected(to_evaluate(tmp_path), document_mask=False)
    [found] = run_distributed(evaluate, 1, tmp_path, device_type="cuda")
    for result in found:
        assert result["tokens"] == len(tokens)
        assert result["loss"] == pytest.approx(np.mean([loss for _, loss in tokens]), rel=1e-4)
        for row in result["positions"]:
            inside = [loss for position, loss in tokens if row["first"] <= position <= row["last"]]
            assert row["loss"] == pytest.approx(np.mean(inside), rel=1e-3)
