"""Traces a few steps for TensorBoard or Perfetto, and computes from the trace where their time went.

On GPUs the intervals are those of kernels and copies, on CPUs those of operators. Each moment of the traced steps is
counted once, as the first of these that holds: computing (the optimizer's apart), communication, waiting for data. So
communication counts only while nothing computes, and waiting for data only while nothing else runs.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launch.monitoring.timing import StepClock

STEPS, DATA, OPTIMIZER = "traced steps", "waiting for data", "optimizer step"
"""Names of the ranges in a trace."""

Interval = tuple[float, float]
"""Start and end."""

_DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


class StepTracer:
    """Records the steps from the first to the last of `steps` (counted from 1), or none."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path, rank: int):
        """Writes rank-N.pt.trace.json.gz and rank-N.parts.json into `directory`."""
        self._steps, self._directory, self._rank = steps, directory, rank
        self._profile: profile | None = None
        self._recording = ExitStack()

    def before(self, step: int, clock: StepClock) -> None:
        """Step `step` is about to begin. What the tracing itself takes is no part of a step by `clock`."""
        if self._steps is None or step != self._steps[0]:
            return
        _finish_device_work()
        with clock.paused():
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = self._recording.enter_context(profile(activities=activities))
            self._recording.enter_context(record_function(STEPS))

    def after(self, step: int, clock: StepClock) -> str | None:
        """Step `step` is over. After the last traced one: writes the files and returns the table of parts."""
        if self._steps is None or self._profile is None or step != self._steps[1]:
            return None
        _finish_device_work()
        with clock.paused():
            self._recording.close()
            traced, self._profile = self._profile, None
            return self._write(traced, *self._steps)

    def _write(self, traced: profile, first: int, last: int) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank-{self._rank}.pt.trace.json.gz"
        traced.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            parts = step_parts(json.load(file)["traceEvents"])
        (self._directory / f"rank-{self._rank}.parts.json").write_text(json.dumps(parts, indent=1))
        return f"{_table(parts, first, last)}\ntrace in {path}"


def _finish_device_work() -> None:
    """Waits for what was issued: its time belongs to the steps, and not to what the host does next."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_parts(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the traced steps by part, which add up to "total", and "communication" as a whole beside them.

    `events` are a Chrome trace's, complete ones with microseconds in `ts` and `dur`.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    window = _named(complete, STEPS)
    on_device = any(event.get("cat") in _DEVICE_WORK for event in complete)
    if on_device:
        work = [event for event in complete if event.get("cat") in _DEVICE_WORK]
    else:  # gloo's own threads note their work as ranges
        work = [event for event in complete if event.get("cat") == "cpu_op" or event["name"].startswith("gloo:")]
    communication = _clipped(_union(_interval(event) for event in work if _communicates(event["name"])), window)
    busy = _clipped(_union(_interval(event) for event in work if not _communicates(event["name"])), window)
    # An operator that communicates is called by others, which only wait for it: on CPUs all of it counts as exposed.
    computing = busy if on_device else _without(busy, communication)
    optimizer = _clipped(computing, _named(complete, OPTIMIZER, on_device))
    exposed = _without(communication, computing)
    data = _without(_clipped(_named(complete, DATA), window), _union([*computing, *communication]))
    parts = {
        "computation": _length(computing) - _length(optimizer),
        "exposed communication": _length(exposed),
        "optimizer": _length(optimizer),
        "data": _length(data),
    }
    total = _length(window)
    parts["other"] = total - sum(parts.values())
    return {
        name: value / 1e6 for name, value in {**parts, "total": total, "communication": _length(communication)}.items()
    }


def _communicates(name: str) -> bool:
    return "nccl" in name.lower() or name.startswith(("gloo:", "c10d::"))


def _interval(event: Mapping[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _named(events: Sequence[Mapping[str, Any]], name: str, on_device: bool = False) -> list[Interval]:
    """The ranges of that name; as the device saw them, where it did."""
    for category in ("gpu_user_annotation", "user_annotation") if on_device else ("user_annotation",):
        found = [_interval(event) for event in events if event["name"] == name and event.get("cat") == category]
        if found:
            return _union(found)
    return []


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _clipped(intervals: Sequence[Interval], to: Sequence[Interval]) -> list[Interval]:
    """The common part of two sets of disjoint intervals."""
    common = [(max(a, c), min(b, d)) for a, b in intervals for c, d in to if max(a, c) < min(b, d)]
    return _union(common)


def _without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What of `intervals` (disjoint) lies outside `others` (disjoint, in order)."""
    left: list[Interval] = []
    for start, end in intervals:
        for low, high in others:
            if high <= start or low >= end:
                continue
            if low > start:
                left.append((start, low))
            start = max(start, high)
        if start < end:
            left.append((start, end))
    return left


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _table(parts: Mapping[str, float], first: int, last: int) -> str:
    lines = [f"steps {first} to {last}, milliseconds a step on this rank:"]
    for name, seconds in parts.items():
        share = f"{seconds / parts['total']:7.1%}" if parts["total"] else ""
        label = "communication, hidden too" if name == "communication" else name
        lines.append(f"  {label:<26}{seconds / (last + 1 - first) * 1000:10.1f}{share}")
    return "\n".join(lines)
