"""What a rank reports about itself when the run hangs, and what all reports together say about who is missing."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_stack

from pydantic import TypeAdapter

from launch.health.flight_recorder import Flight
from launch.health.time_limits import Activity

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_ROOT = str(Path(__file__).resolve().parents[2])
_INNERMOST, _FRAMES = 3, 12
"""Of a stack, the verdict shows the innermost frames whosever they are, and our own above them; the whole one is in the
rank's own file."""
_PENDING = 3
"""Collectives that are named: on a GPU those after the first only queue behind it."""
_OURS = ("launch/", "model/", "parallel/")
_COMMUNICATES = ("parallel/", "deepspeed/runtime/zero/", "deepspeed/comm/")


@dataclass(frozen=True)
class Member:
    """A rank as all of them know it from the start."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class RankReport:
    """The report of one rank."""

    rank: int
    time: float
    """Seconds of the wall clock."""
    activity: str
    seconds: float
    """Since that began."""
    stack: list[str]
    """The training thread's frames, innermost first."""
    flight: Flight | None = None
    """What torch's flight recorders say; None while they have not answered."""
    neighbours: dict[int, str] = field(default_factory=dict)
    """Rank -> state of the processes of its node, as Linux shows them."""

    def to_json(self) -> str:
        return _REPORT.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> RankReport:
        """The inverse of `to_json`. Raises ValueError for half a report."""
        return _REPORT.validate_json(text)

    @property
    def waits_in(self) -> str | None:
        """The collective that holds the training thread, as far as its stack shows it."""
        for number, frame in enumerate(self.stack):
            place, _, function = frame.rpartition(" ")
            if _COLLECTIVES in place and not function.startswith("_"):
                caller = next((above for above in self.stack[number + 1 :] if above.startswith(_OURS)), "")
                return f"{function}, called at {caller}" if caller else function
        # Messages that were begun before are waited for where they are needed.
        innermost = self.stack[0] if self.stack else ""
        return innermost.rpartition(" ")[2] if innermost.startswith(_COMMUNICATES) else None

    @property
    def pending(self) -> str:
        """What is not over, for a person."""
        if self.flight is None:
            return "torch's flight recorder does not answer, so a call into the driver may hang"
        first, more = self.flight.unfinished[:_PENDING], len(self.flight.unfinished) - _PENDING
        listed = ", ".join(first) + (f" and {more} called after that" if more > 0 else "")
        return f"not over: {listed}" if first else self.flight.remark

    @property
    def last(self) -> dict[str, int]:
        """Process group -> number of the last collective that the rank has called in it."""
        return self.flight.last if self.flight else {}

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is known to wait for no collective."""
        return self.waits_in is None and self.flight is not None and not self.flight.unfinished


_REPORT = TypeAdapter(RankReport)  # made here: in a hang there may be no file system to import from


def report_on_myself(rank: int, activity: Activity, neighbours: Mapping[int, str]) -> RankReport:
    """Called in another thread than the training's; touches no device, and asks no flight recorder."""
    return RankReport(
        rank=rank,
        time=time.time(),
        activity=str(activity),
        seconds=time.monotonic() - activity.began,
        stack=training_stack(),
        neighbours=dict(neighbours),
    )


def training_stack() -> list[str]:
    """`path:line function` of the main thread's frames, innermost first; reads no source files."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    shown = []
    for inner, line in walk_stack(frame) if frame else ():
        path = inner.f_code.co_filename.removeprefix(f"{_ROOT}/").rpartition("site-packages/")[2]
        shown.append(f"{path}:{line} {inner.f_code.co_qualname}")
    return shown


def missing_ranks(reports: Mapping[int, RankReport], members: Sequence[Member]) -> list[int]:
    """Those for whom the others wait: the silent ones; where all answer, those that have not called a collective in
    which others are, and wait in none themselves. Empty where that does not tell them apart."""
    silent = [member.rank for member in members if member.rank not in reports]
    if silent:
        return silent
    furthest: dict[str, int] = defaultdict(int)
    for report in reports.values():
        for group, number in report.last.items():
            furthest[group] = max(furthest[group], number)
    behind = {
        rank
        for rank, report in reports.items()
        if any(number < furthest[group] for group, number in report.last.items())
    }
    elsewhere = {rank for rank, report in reports.items() if report.is_elsewhere}
    found = (behind & elsewhere) or elsewhere
    return sorted(found) if len(found) < len(reports) else []


def verdict(
    headline: str,
    reports: Mapping[int, RankReport],
    members: Sequence[Member],
    states: Mapping[int, str],
    dumps: Mapping[int, str],
) -> str:
    """The whole explanation: who is missing, what Linux says of them, and where the others wait.

    `states` are process states by rank, `dumps` stacks that ranks without a word have left nevertheless.
    """
    lines, missing = [headline], missing_ranks(reports, members)
    for rank in missing:
        member, report = members[rank], reports.get(rank)
        if report is None:
            beside = any(members[other].host == member.host for other in reports)
            unseen = "no such process" if beside else "nobody on its node answers, so the node itself may be gone"
            state = states.get(rank, unseen)
            lines.append(f"missing: rank {rank} on {member.host}, which does not answer; process {member.pid}: {state}")
            lines += [f"    {line}" for line in dumps.get(rank, "").splitlines()[: 2 * _FRAMES]]
        else:
            lines.append(
                f"missing: rank {rank} on {member.host}, which is in no collective; {report.activity}, "
                f"for {report.seconds:.0f} s"
            )
    if not missing:
        lines.append("no single rank is missing: all answer, and wait in different places")
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, report in sorted(reports.items()):
        groups[tuple(report.stack)].append(rank)
    for stack, ranks in groups.items():
        report = reports[ranks[0]]
        where = f", waiting in {report.waits_in}" if report.waits_in else ""
        pending = f", {report.pending}" if report.pending else ""
        lines.append(
            f"{'ranks' if ranks[1:] else 'rank'} {_ranges(ranks)} on {_hosts(ranks, members)}{where}{pending}:"
        )
        ours = [frame for frame in stack[_INNERMOST:] if frame.startswith(_OURS)]
        lines += [f"    {frame}" for frame in [*stack[:_INNERMOST], *ours][:_FRAMES]]
    return "\n".join(lines)


def _ranges(ranks: Iterable[int]) -> str:
    """0-3, 7"""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _hosts(ranks: Sequence[int], members: Sequence[Member]) -> str:
    names = list(dict.fromkeys(members[rank].host for rank in ranks))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
