"""Notices that a run hangs, reports who is missing, and ends the run so that it can continue elsewhere.

Each rank has a thread that looks once a second at what the training thread has last begun. It waits for no device and
no collective; the training thread only notes the time of each step. The threads of all ranks talk through files in the
run directory. A store would live in one of the ranks, and be silent exactly when that one is stopped. Messages between
the others would need connections that nobody uses for weeks.

    a rank waits longer than its limit      it raises the alarm; all who hear it write down where they are
    7 s later                               they ask the silent ranks of their nodes for a stack, by a signal
    12 s after the alarm                    the first of those who did reports what they found, and who did not
    health.hang_grace_seconds later         unless the step has ended meanwhile, all of them end with HUNG

From the alarm on the run is asked to stop: if the missing rank comes back, the run saves and ends as after a signal. If
no rank can run, or the file system hangs, the node reports for its ranks (`launch/health/node_watch.py`).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from launch.exit_status import HUNG
from launch.health.flight_recorder import read_flight
from launch.health.hang_report import Member, RankReport, missing_ranks, report_on_myself, verdict
from launch.health.health_folder import HealthFolder
from launch.health.node_watch import Pulse
from launch.health.processes import process_state, ranks_beside
from launch.health.time_limits import Activity, Pace
from launch.standard_output import say

_STILL_FRESH = 120.0
"""Seconds between clocks and alarms within which a report belongs to the hang at hand."""
_ASK = signal.SIGURG
"""Makes a rank write its training thread's stack. One that does not listen yet ignores it."""


@dataclass(frozen=True)
class Patience:
    """Seconds; of the parts of an alarm."""

    tick: float = 1.0
    """Between two looks."""
    hear: float = 5.0
    """Until every rank has looked whether there is an alarm."""
    answer: float = 12.0
    """From the alarm to the verdict."""
    grace: float = 60.0
    """From the verdict to the end."""


class Watchdog:
    """One rank's; `pace` is what the training thread tells it."""

    def __init__(
        self,
        folder: HealthFolder,
        pace: Pace,
        rank: int,
        members: list[Member],
        patience: Patience,
        *,
        stops: bool,
        beat: Callable[[Pulse | None], None] = lambda pulse: None,
    ) -> None:
        """`members` are all ranks, in order. `stops`: a hang ends the run; else it is only told. `beat`: takes the
        pulse of each look, None at the end."""
        self._folder, self._pace, self._rank, self._members = folder, pace, rank, members
        self._patience, self._stops, self._beat, self._looks = patience, stops, beat, 0
        self._wants_stop = threading.Event()
        self._closed = threading.Event()
        self._handled = ""
        self._stacks = self._open()
        faulthandler.register(_ASK, self._stacks, all_threads=False)
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _open(self) -> TextIO:
        """A file that faulthandler may write into at any time. Without it the run continues, and is watched less."""
        try:
            self._folder.make()
            return open(self._folder.stacks(self._rank), "w+")
        except OSError as error:
            self._complain(error)
            return open(os.devnull, "w+")

    def wants_stop(self) -> bool:
        """Whether this rank has seen a hang after which the run should end."""
        return self._wants_stop.is_set()

    def close(self) -> None:
        """From now on everything may take as long as it takes."""
        self._closed.set()
        self._beat(None)

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        patience, seen, awake, since_heard = self._patience, self._pace.current, 0.0, 0.0
        grace = patience.grace if self._stops else None
        looked = time.monotonic()
        while not self._closed.wait(patience.tick):
            now, current = time.monotonic(), self._pace.current
            passed, looked = now - looked, now
            if current is not seen:
                seen, awake = current, 0.0
            # A process that was stopped itself, with its whole machine perhaps, does not count that time.
            awake += min(passed, 5 * patience.tick)
            since_heard += passed
            limit, why = self._pace.limit(current.kind)
            self._looks += 1
            # Before anything that a file server can hold up.
            self._beat(Pulse(self._rank, os.getpid(), self._looks, str(current), limit - awake, grace))
            overdue = awake > limit
            if overdue or since_heard > patience.hear:
                since_heard = 0.0
                try:
                    called = self._called(current, f"takes longer than {limit:.0f} s: {why}" if overdue else None)
                except OSError as error:
                    called = overdue
                    self._complain(error)
                if called:
                    self._raise_voice(current)
                    looked = time.monotonic()

    def _called(self, current: Activity, complaint: str | None) -> bool:
        """Whether there is an alarm that this rank has not answered; with a complaint it raises one."""
        heard = self._folder.alarm()
        if heard == self._handled and complaint:
            heard = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {current} {complaint}"
            self._folder.raise_alarm(heard)
        new, self._handled = heard != self._handled, heard
        return new

    def _raise_voice(self, current: Activity) -> None:
        """Answers, waits for the others, tells what came of it, and ends this rank if the run does not go on."""
        patience = self._patience
        if self._stops:
            self._wants_stop.set()
        # In a thread of its own: a file server that hangs must not keep this one from ending the rank.
        telling = threading.Thread(target=self._tell, args=(current,), name="watchdog's report", daemon=True)
        telling.start()
        telling.join(3 * patience.answer)
        deadline = time.monotonic() + patience.grace
        while self._pace.current is current and not self._closed.is_set():
            if self._stops and time.monotonic() > deadline:
                say(f"rank {self._rank} ends: {current} has not come to its end; exit status {HUNG}", sys.stderr)
                os._exit(HUNG)
            time.sleep(patience.tick)

    def _tell(self, current: Activity) -> None:
        try:
            self._answer(current)
            time.sleep(self._patience.answer - self._patience.hear)
            self._ask_the_silent()
            time.sleep(self._patience.hear)
            self._handled = self._folder.alarm()  # of two raised at once, one was overwritten
            reports = self._reports(self._members)
            first = min(reports, default=self._rank)
            if first != self._rank:
                time.sleep(self._patience.hear)
                if self._folder.verdict(first) is not None:
                    return
            self._speak(reports)
        except OSError as error:
            self._complain(error)

    def _answer(self, current: Activity) -> None:
        report = report_on_myself(self._rank, current, ranks_beside(os.getppid()))
        name = f"rank-{self._rank}.json"
        self._folder.write(name, report.to_json())
        faulthandler.dump_traceback(file=self._stacks)
        self._folder.write(name, replace(report, flight=read_flight()).to_json())

    def _ask_the_silent(self) -> None:
        """Makes the ranks of this node that do not answer write their stacks, without Python's lock: a call holds that.

        Without the lock a stack can only be read while it stands still, or the reader crashes. So nothing is written by
        a clock, which runs on while a process is stopped, and a stopped one is not asked: it would answer when it runs
        again.
        """
        beside = [member for member in self._members if member.host == self._members[self._rank].host]
        reports = self._reports(beside)
        for member in beside:
            if member.rank not in reports and process_state(member.pid).startswith(("state R", "state S", "state D")):
                with suppress(OSError):  # gone meanwhile
                    os.kill(member.pid, _ASK)

    def _reports(self, members: Iterable[Member]) -> dict[int, RankReport]:
        found = {}
        for member in members:
            with suppress(ValueError):  # half written
                report = RankReport.from_json(self._folder.report(member.rank) or "")
                if abs(report.time - time.time()) < _STILL_FRESH:
                    found[member.rank] = report
        return found

    def _speak(self, reports: dict[int, RankReport]) -> None:
        members, folder = self._members, self._folder
        states: dict[int, str] = {}
        hosts = {member.host for member in members}
        for number in range(len(hosts)):
            states |= folder.node(number)
        for report in reports.values():
            states |= report.neighbours
        silent = [member.rank for member in members if member.rank not in reports]
        dumps = {rank: _last_dump(folder.stacks(rank)) for rank in silent}
        text = verdict(f"hang: {self._handled}", reports, members, states, dumps)
        blamed = list(dict.fromkeys(members[rank].host for rank in missing_ranks(reports, members)))
        folder.write_suspects(blamed if len(blamed) < len(hosts) else [])
        end = f"; without an end in {self._patience.grace:.0f} s the run is ended" if self._stops else ""
        text += f"\nstacks of all threads: {folder.path}/rank-*.stacks{end}"
        folder.write(f"verdict-{self._rank}.txt", text + "\n")
        say(text, sys.stderr)

    def _complain(self, error: OSError) -> None:
        say(f"warning: the watchdog cannot use {self._folder.path}: {error}", sys.stderr)


def _last_dump(path: Path) -> str:
    """The training thread's stack as it was asked for last."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return "".join(text.rpartition("Stack (")[1:]).strip()
