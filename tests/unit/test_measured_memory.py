"""The memory that `--check` promises, against what rows of the committed results took on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import JobConfig
from launch.memory.footprint import footprint
from shipped_alone import JOBS, short
from step_time import measured_policies
from workload import job_of

DOCS = Path(__file__).resolve().parents[2] / "docs"


def measured_rows() -> list[Any]:
    """Rows of ours in the committed results: the overrides, the row, and its peak in GiB."""
    found = []
    for page in ("throughput", "longest_context", "shipped_alone"):
        for name, row in json.loads((DOCS / f"{page}.json").read_text()).items():
            if "failed" in row or row.get("system", "ringzero") != "ringzero":
                continue
            peak = row["peak_gib"] + row.get("uncounted_gib", 0.0)
            found.append(pytest.param(page, name, row, peak, id=f"{page}: {name}"))
    return found


def measured_job(page: str, name: str, row: dict[str, Any]) -> JobConfig:
    if page == "shipped_alone":
        return short(*JOBS[name], [])
    settings = [f"model.num_hidden_layers={row['layers']}", *row["settings"]]
    if page == "longest_context":
        settings += [f"training.sequence_length={row['tokens']}", "training.global_batch_size=1"]
        settings += [f"parallel.context_parallel_size={row['gpus']}"]
    return job_of(settings)


@pytest.mark.parametrize(("page", "name", "row", "peak"), measured_rows())
def test_the_estimate_is_that_of_measured_rows(page: str, name: str, row: dict[str, Any], peak: float) -> None:
    """What torch's allocator gave out on H200s, under the policies of that time and today's formulas."""
    job = measured_job(page, name, row)
    policies = measured_policies(job, row)
    estimate = footprint(job, job.mesh_shape(row["gpus"]), "cuda", policies).peak / 2**30
    assert 0.97 * peak <= estimate <= 1.04 * peak, estimate / peak
