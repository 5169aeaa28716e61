"""Measures where a step's time goes, without stopping the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch


class StepTimer:
    """Marks the parts of steps; `collect` gives their mean seconds since the last collection.

    On a GPU the marks are events on the compute stream, read only by `collect`, which waits for the last one.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self._steps = 0

    def start(self) -> None:
        """A step begins."""
        self._steps += 1
        self._marks.append(("", self._now()))

    def mark(self, part: str) -> None:
        """The time since the previous mark (or start) belongs to `part`."""
        self._marks.append((part, self._now()))

    def collect(self) -> dict[str, float]:
        """Mean seconds of each part over the steps since the last call."""
        if not self._marks:
            return {}
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (_, before), (part, after) in pairwise(self._marks):
            if part:
                totals[part] += _elapsed(before, after)
        steps, self._steps = self._steps, 0
        self._marks.clear()
        return {part: total / steps for part, total in totals.items()}

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StepClock:
    """How long steps take by the wall: the mean of all since the last reading, without the pauses between them."""

    def __init__(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def count(self) -> None:
        """Another step is over."""
        self._steps += 1

    def read(self) -> float:
        """Mean seconds of the steps counted since the last reading, of which there is one at least."""
        now = time.perf_counter()
        seconds = (now - self._since) / self._steps
        self._since, self._steps = now, 0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile is no part of a step."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun


def _elapsed(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event)
    return before.elapsed_time(after) / 1000
