"""fp16 with DeepSpeed's dynamic loss scaler. On CPUs DeepSpeed refuses fp16 as too slow; here it is told otherwise."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from launch.build import build_engine
from launch.stepper import Stepper
from parallel.mesh import MeshShape, ParallelMesh
from tests.distributed.harness import run_distributed
from tests.distributed.parity import Rows, dense_twin
from tests.distributed.parity_cases import STEPS, Case

LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]


def _train(layout: tuple[int, int, int], stage: int, first_scale: float | None) -> dict[str, list[Any]]:
    """Five steps; the loss scaler starts from `first_scale` if given."""
    case = Case(*layout, stage, False, precision="fp16")
    mesh = ParallelMesh.create(MeshShape(*layout))
    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True):
        engine, _ = build_engine(case.job(), mesh, torch.device("cpu"))
    if first_scale is not None:
        engine.loss_scaler_state = {"cur_scale": first_scale}
    stepper = Stepper(case.job(), mesh, engine)
    found: dict[str, list[Any]] = {"loss": [], "norm": [], "applied": [], "scale": [], "updates": []}
    for step in range(STEPS):
        outcome = stepper.train(step, stepper.cut(Rows(case, mesh.dp_rank).micro_batches(step)))
        assert stepper.is_sound(outcome), "a skipped step is no failure"
        found["loss"].append(outcome.loss)
        found["norm"].append(outcome.grad_norm)
        found["applied"].append(outcome.applied)
        found["scale"].append(engine.loss_scaler_state["cur_scale"])
        found["updates"].append(engine.step_count)
    return found


def _train_stages(layout: tuple[int, int, int]) -> list[dict[str, list[Any]]]:
    return [_train(layout, stage, 1024.0) for stage in (1, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_learns_as_in_fp32(layout: tuple[int, int, int]) -> None:
    twin = dense_twin(Case(1, 1, 1, 0, False))
    for rank in run_distributed(_train_stages, 2, layout):
        for found in rank:
            assert all(found["applied"])
            np.testing.assert_allclose(found["loss"], twin.losses, rtol=1e-3)
            np.testing.assert_allclose(found["norm"], twin.grad_norms, rtol=1e-2)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    for found in run_distributed(_train, 2, (2, 1, 1), 2, 2.0**30):
        skipped = found["applied"].count(False)
        assert skipped > 0 and not found["applied"][0]
        assert found["updates"] == [sum(found["applied"][: step + 1]) for step in range(STEPS)]
        assert found["scale"][-1] < 2.0**30 and np.isfinite(found["loss"]).all()
