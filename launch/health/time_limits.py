"""Measures how long the parts of a run take, and says how long they may."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

from launch.sections.health import HealthSection

STEP = "step"
_KNOWN_AFTER = 5
"""Steps until their median counts: the first ones compile, connect and fill caches."""
_REMEMBERED = 20


@dataclass(frozen=True)
class Activity:
    """What the training thread last began."""

    kind: str
    step: int
    began: float
    """Seconds of the monotonic clock."""

    def __str__(self) -> str:
        return f"{self.kind} {self.step}" if self.kind == STEP else f"{self.kind} at step {self.step}"


class Pace:
    """The training thread begins; another may look at any time, without a lock: each of the two reads or replaces whole
    objects."""

    def __init__(self, limits: HealthSection) -> None:
        self._limits = limits
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._noted = 0.0
        self.current = Activity("start", 0, time.monotonic())

    def begin(self, kind: str, step: int) -> None:
        """Notes that the previous activity has ended and this one begins."""
        before, now = self.current, time.monotonic()
        self._durations[before.kind].append(now - before.began)
        self.current = Activity(kind, step, now)

    def limit(self, kind: str) -> tuple[float, str]:
        """Seconds that something of this kind may take, and how that comes about."""
        limits, past = self._limits, tuple(self._durations.get(kind, ()))
        known = len(past) >= _KNOWN_AFTER if kind == STEP else bool(past)
        least, name = (
            (limits.minimum_step_seconds, "health.minimum_step_seconds")
            if kind == STEP and known
            else (limits.first_step_seconds, "health.first_step_seconds")
        )
        usual = limits.step_limit * median(past) if known else 0.0
        if usual > least:
            return usual, f"health.step_limit ({limits.step_limit:g}) x the median of {median(past):.3g} s"
        known_median = f", more than {limits.step_limit:g} x the median of {median(past):.3g} s" if known else ""
        return least, f"{name}{known_median}"

    def note(self) -> str | None:
        """A line for the log once a step's limit is known from steps, and whenever it has doubled or halved since."""
        seconds, why = self.limit(STEP)
        if len(self._durations.get(STEP, ())) < _KNOWN_AFTER or self._noted / 2 < seconds < self._noted * 2:
            return None
        self._noted = seconds
        return f"a step that takes longer than {seconds:.0f} s counts as hung: {why}"
