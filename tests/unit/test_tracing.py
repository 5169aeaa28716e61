"""Where a step's time went, by intervals drawn by hand, and a real trace of a few steps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from launch.monitoring.timing import StepClock
from launch.monitoring.tracing import DATA, OPTIMIZER, STEPS, StepTracer, step_parts


def event(category: str, name: str, start: float, end: float) -> dict[str, Any]:
    """Milliseconds."""
    return {"ph": "X", "cat": category, "name": name, "ts": start * 1000, "dur": (end - start) * 1000}


def test_each_moment_on_a_gpu_counts_once() -> None:
    parts = step_parts(
        [
            {"ph": "M", "name": "process_name"},
            event("user_annotation", STEPS, 0, 100),
            event("kernel", "gemm", -20, 0),  # before the traced steps
            event("user_annotation", DATA, 0, 12),
            event("kernel", "gemm", 5, 30),  # computes for 7 ms of the wait
            event("kernel", "flash_fwd", 25, 40),  # beside it, on another stream
            event("kernel", "ncclDevKernel_AllGather", 35, 55),  # 15 ms of it exposed
            event("gpu_memcpy", "Memcpy HtoD", 60, 62),
            event("gpu_user_annotation", OPTIMIZER, 70, 90),
            event("user_annotation", OPTIMIZER, 41, 45),  # the host was done with it long before
            event("kernel", "adam", 72, 88),
            event("kernel", "ncclDevKernel_AllReduce", 86, 95),  # 7 ms exposed
            event("cpu_op", "aten::mm", 0, 100),  # the host's work is no part of the device's
        ]
    )
    milliseconds = {name: round(1000 * seconds, 6) for name, seconds in parts.items()}
    assert milliseconds == {
        "computation": 35 + 2,
        "exposed communication": 15 + 7,
        "optimizer": 16,
        "data": 5,
        "other": 100 - 37 - 22 - 16 - 5,
        "total": 100,
        "communication": 20 + 9,
    }


def test_on_a_cpu_operators_are_counted() -> None:
    parts = step_parts(
        [
            event("user_annotation", STEPS, 0, 50),
            event("cpu_op", "_CopyToGroupBackward", 0, 30),  # calls the next, and waits for it
            event("cpu_op", "c10d::allreduce_", 10, 15),
            event("user_annotation", "gloo:all_reduce", 12, 25),
            event("cpu_op", "aten::mm", 2, 9),
            event("user_annotation", OPTIMIZER, 30, 40),
            event("cpu_op", "aten::addcmul_", 32, 40),
        ]
    )
    found = {name: round(1000 * seconds, 6) for name, seconds in parts.items()}
    assert found["computation"] == 15 and found["exposed communication"] == found["communication"] == 15
    assert found["optimizer"] == 8 and found["data"] == 0 and found["other"] == 12


class PausesNoted(StepClock):
    """Counts the files of a folder before and after each pause."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.pauses = folder, list[tuple[int, int]]()

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = len(list(self.folder.glob("*")))
        yield
        self.pauses.append((before, len(list(self.folder.glob("*")))))


def test_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    tracer, clock = StepTracer((2, 3), tmp_path / "trace", rank=1), PausesNoted(tmp_path / "trace")
    matrix, told = torch.randn(200, 200), []
    for step in range(1, 5):
        tracer.before(step, clock)
        with record_function(DATA):
            pass
        matrix = (matrix @ matrix).tanh()
        with record_function(OPTIMIZER):
            matrix.add_(1)
        told.append(tracer.after(step, clock))
    assert told[0] is told[1] is told[3] is None and told[2] is not None
    assert told[2].startswith("steps 2 to 3, milliseconds a step on this rank:") and "optimizer" in told[2]
    with gzip.open(tmp_path / "trace" / "rank-1.pt.trace.json.gz", "rt") as file:
        names = [e["name"] for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    assert names.count("aten::mm") == 2 and names.count(DATA) == 2 and names.count(STEPS) == 1
    parts = json.loads((tmp_path / "trace" / "rank-1.parts.json").read_text())
    assert parts["computation"] > 0 and parts["optimizer"] > 0 and parts["communication"] == 0
    total = parts.pop("total")
    assert clock.pauses == [(0, 0), (0, 2)], "both files are written while the steps' clock stands still"
    del parts["communication"]
    assert sum(parts.values()) == pytest.approx(total)


def test_nothing_is_traced_unless_asked(tmp_path: Path) -> None:
    tracer = StepTracer(None, tmp_path / "trace", rank=0)
    tracer.before(1, StepClock())
    assert tracer.after(1, StepClock()) is None and not (tmp_path / "trace").exists()
