"""Who is missing, what is too slow and what takes too long, from made-up reports and measurements."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from launch.health.flight_recorder import Flight, flight_of
from launch.health.hang_report import Member, RankReport, missing_ranks, verdict
from launch.health.health_folder import HealthFolder
from launch.health.node_watch import NodeWatch, Pulse, Pulses
from launch.health.probes import Rates, outliers, pairings, summary
from launch.health.processes import children
from launch.health.stragglers import slowest
from launch.health.time_limits import STEP, Activity, Pace
from launch.sections.health import HealthSection

MEMBERS = [Member(rank, f"node-{1 + rank // 2}", 100 + rank) for rank in range(4)]
TRAIN_STEP = "launch/stepper.py:66 Stepper.train"
WAITS = [
    "torch/distributed/distributed_c10d.py:2900 all_reduce",
    "torch/distributed/c10d_logger.py:83 wrapper",
    TRAIN_STEP,
]
READS = [
    "threading.py:331 Condition.wait",
    "launch/data/prefetch.py:28 prefetched.<locals>.loaded",
    "launch/trainer.py:90 Trainer.run",
]


def report(rank: int, stack: list[str], **groups: int) -> RankReport:
    return RankReport(rank, 0.0, "step 9", 70.0, stack, Flight(groups), {})


def reports(*those: RankReport) -> dict[int, RankReport]:
    return {one.rank: one for one in those}


def test_a_silent_rank_is_missing_whatever_the_others_do() -> None:
    found = reports(report(0, WAITS, world=7), report(1, WAITS, world=7), report(2, READS, world=6))
    assert missing_ranks(found, MEMBERS) == [3]
    text = verdict("hang: step 9", found, MEMBERS, {3: "state T (stopped by a signal), in do_signal_stop"}, {})
    assert (
        "missing: rank 3 on node-2, which does not answer; process 103: state T (stopped by a signal), in "
        "do_signal_stop\n"
    ) in text
    assert f"ranks 0-1 on node-1, waiting in all_reduce, called at {TRAIN_STEP}:\n    {WAITS[0]}\n" in text
    assert f"rank 2 on node-2:\n    {READS[0]}\n" in text


def test_a_rank_that_answers_from_elsewhere_is_missing() -> None:
    behind = report(2, READS, world=6)
    found = reports(report(0, WAITS, world=7), report(1, WAITS, world=7), behind, report(3, WAITS, world=7))
    assert missing_ranks(found, MEMBERS) == [2]
    assert "missing: rank 2 on node-2, which is in no collective; step 9, for 70 s" in verdict(
        "", found, MEMBERS, {}, {}
    )


def test_a_rank_that_waits_for_the_missing_one_is_not_missing() -> None:
    """Rank 2 reads data, 3 waits for it along tp, 0 and 1 wait for 3 along dp: 3 is behind there, but not the cause."""
    found = reports(
        report(0, WAITS, dp=4), report(1, WAITS, dp=4), report(2, READS, tp=5), report(3, WAITS, tp=6, dp=3)
    )
    assert missing_ranks(found, MEMBERS) == [2]


def test_messages_on_their_way_count_as_waiting() -> None:
    waiting = report(1, ["launch/trainer.py:99 Trainer.run"], world=7)
    waiting = replace(waiting, flight=Flight({"world": 7}, ["all_gather number 7 in group world"]))
    inside = report(3, ["parallel/transport.py:92 _Messages.wait", TRAIN_STEP], world=7)
    found = reports(report(0, WAITS, world=7), waiting, report(2, READS, world=7), inside)
    assert missing_ranks(found, MEMBERS) == [2]
    text = verdict("", found, MEMBERS, {}, {})
    assert "rank 1 on node-1, not over: all_gather number 7 in group world:" in text
    assert "rank 3 on node-2, waiting in _Messages.wait:" in text


def recorded(name: str, group: list[str], number: int, **state: Any) -> dict[str, Any]:
    """One entry of a flight recorder, as torch writes it (FlightRecorderDetail.hpp, version 2.10)."""
    usual = {"is_p2p": False, "p2p_seq_id": 0, "retired": False, "state": "scheduled", "time_created_ns": number}
    entry = {"collective_seq_id": number, "process_group": group, "profiling_name": name}
    return entry | usual | state


def test_a_flight_is_what_both_recorders_have_noted() -> None:
    gloo = [recorded("gloo:all_reduce", ["6", "stopping"], 40, retired=True), recorded("gloo:barrier", ["7", ""], 90)]
    nccl = [
        recorded("nccl:_all_gather_base", ["0", "default_pg"], 51, state="completed"),
        recorded("nccl:all_reduce", ["3", "tp"], 52, state="started"),
        recorded("nccl:send 0->1", ["3", "tp"], 52, is_p2p=True, p2p_seq_id=4, time_created_ns=53),
        recorded("nccl:_all_gather_base", ["0", "default_pg"], 70),
    ]
    found = flight_of([{"entries": gloo}, {"entries": nccl}, {"version": "2.10"}])
    assert found.last == {"6 (stopping)": 40, "7": 90, "3 (tp)": 52, "0 (default_pg)": 70}
    assert found.unfinished == [
        *("all_reduce number 52 in group 3 (tp)", "send 0->1 number 4 in group 3 (tp)"),
        *("_all_gather_base number 70 in group 0 (default_pg)", "barrier number 90 in group 7"),
    ]
    stuck = replace(report(0, READS), flight=found)
    assert not stuck.is_elsewhere
    text = verdict("", reports(stuck), MEMBERS[:1], {}, {})
    assert "rank 0 on node-1, not over: all_reduce number 52 in group 3 (tp), send 0->1 number 4" in text
    assert "number 70 in group 0 (default_pg) and 1 called after that:" in text


def test_a_rank_whose_recorder_is_silent_is_not_taken_for_the_cause() -> None:
    silent = replace(report(1, ["launch/trainer.py:99 Trainer.run"]), flight=None)
    found = reports(report(0, WAITS), silent, report(2, READS), report(3, WAITS))
    assert missing_ranks(found, MEMBERS) == [2]
    assert "rank 1 on node-1, torch's flight recorder does not answer" in verdict("", found, MEMBERS, {}, {})


ASKED = """
import os, threading
from torch._C import _distributed_c10d as c10d
from launch.health import flight_recorder
from launch.health.flight_recorder import Flight, read_flight

flight_recorder._SECONDS, flight_recorder._RECORDERS = 0.2, ("never heard of",)
assert read_flight() == Flight()
c10d._register_handler("hangs", lambda *_: threading.Event().wait())
flight_recorder._RECORDERS = ("hangs",)
assert read_flight() is None
flight_recorder.tempfile.tempdir = "/proc"
assert read_flight().remark.startswith("torch's flight recorder cannot be read"), read_flight()
os._exit(76)
"""


def test_a_recorder_that_cannot_be_asked_or_does_not_answer() -> None:
    """In a process of its own, which torch's handlers outlive."""
    ended = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 76, ended.stderr


def test_ranks_in_different_collectives_miss_nobody() -> None:
    other = [WAITS[0].replace("all_reduce", "barrier"), *WAITS[1:]]
    found = reports(*(report(rank, WAITS if rank % 2 else other, world=7) for rank in range(4)))
    assert missing_ranks(found, MEMBERS) == []
    text = verdict("", found, MEMBERS, {}, {})
    assert "no single rank is missing" in text and "ranks 1, 3 on node-1, node-2, waiting in all_reduce" in text
    assert "ranks 0, 2 on node-1, node-2, waiting in barrier" in text


def test_a_node_that_is_gone_and_a_dump_without_words() -> None:
    found = reports(report(0, WAITS), report(1, WAITS))
    text = verdict("", found, MEMBERS, {3: "state R (running)"}, {3: 'Timeout!\n  File "x.py", line 3 in spin'})
    assert "rank 2 on node-2, which does not answer; process 102: nobody on its node answers" in text
    assert 'process 103: state R (running)\n    Timeout!\n      File "x.py", line 3 in spin\n' in text


def test_reports_read_back() -> None:
    one = report(2, WAITS, world=6)
    one.neighbours[3] = "state T"
    assert RankReport.from_json(one.to_json()) == one
    assert RankReport.from_json(replace(one, flight=None).to_json()).flight is None
    with pytest.raises(ValueError):
        RankReport.from_json(one.to_json()[:40])


def test_a_step_may_take_a_multiple_of_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 30.0)
    monkeypatch.setattr("launch.health.time_limits.time.monotonic", lambda: next(now))
    pace = Pace(HealthSection(step_limit=10.0, minimum_step_seconds=120.0, first_step_seconds=1800.0))
    assert pace.limit("start") == (1800.0, "health.first_step_seconds")
    for step in range(1, 6):
        pace.begin(STEP, step)
        assert pace.limit(STEP)[0] == 1800.0 and pace.note() is None
    pace.begin("evaluation", 5)
    assert pace.limit(STEP) == (300.0, "health.step_limit (10) x the median of 30 s")
    assert (
        pace.note() == "a step that takes longer than 300 s counts as hung: health.step_limit (10) x the median of 30 s"
    )
    assert pace.note() is None
    assert pace.limit("evaluation")[0] == 1800.0  # evaluating is no step
    now = itertools.count(next(now), 1.0)
    for step in range(6, 30):
        pace.begin(STEP, step)
    assert pace.limit(STEP)[0] == 120.0 and "health.minimum_step_seconds" in (pace.note() or "")
    assert pace.limit("evaluation")[0] == 1800.0  # nor when there has been one
    assert pace.current == Activity(STEP, 29, pace.current.began) and str(pace.current) == "step 29"


def test_a_pulse_that_is_being_written_is_left_for_the_next_look() -> None:
    pulses, of_rank = Pulses.make(), Pulse(3, 17, 1, "step 9", 4.0, None)
    pulses.write(0, of_rank)
    pulses.write(1, of_rank)
    with open(pulses.path, "r+b") as memory:
        memory.seek(20)
        memory.write(b'"half": {')
    assert pulses.read() == {1: of_rank}
    pulses.write(0, of_rank)
    assert pulses.read() == {0: of_rank, 1: of_rank}


@pytest.mark.parametrize("count", range(1, 12))
def test_each_node_meets_its_neighbours_once_and_one_at_a_time(count: int) -> None:
    rounds = pairings(count)
    for meeting in rounds:
        seen = [node for pair in meeting for node in pair]
        assert len(seen) == len(set(seen))
    met = sorted(tuple(sorted(pair)) for meeting in rounds for pair in meeting)
    circle = {tuple(sorted((node, (node + 1) % count))) for node in range(count)} if count > 1 else set()
    assert met == sorted(circle)
    assert len(rounds) <= 3


def rates(**changes: float) -> Rates:
    return Rates(**({"matmul": 6e14, "node": 3e11, "pairs": 4e10, "write": 1e9} | changes))


def test_outliers_are_named_with_their_peers() -> None:
    found = [rates(), rates(), rates(matmul=3e14), rates(pairs=1.0, write=1.0)]
    (slow,) = outliers(found, MEMBERS, 0.7)  # rank 3 speaks for no node: rank 2 is its first
    assert slow.node == "node-2"
    assert slow.words == "node-2: matmul of rank 2, 300 TFLOP/s, is 50% of its peers' 600 TFLOP/s"
    assert not outliers(found, MEMBERS, 0.49)
    alone = [Member(rank, f"node-{rank}", 0) for rank in range(4)]
    words = [one.words for one in outliers(found, alone, 0.7)]
    assert "node-3: writing of node-3, 1 B/s, is 0% of its peers' 1 GB/s" in words and len(words) == 3
    assert len(outliers([rates(), rates(matmul=3e14)], alone[:2], 0.6)) == 1  # itself is not among its peers
    assert not outliers([rates(node=None, pairs=None)] * 2, MEMBERS[:2], 0.99)
    assert "matmul 600 TFLOP/s (300 T to 600 T)" in summary(found, 1.0)


def test_the_slowest_rank_by_what_it_does_alone() -> None:
    found = slowest([1.0, 1.0, 2.0, 1.0], [0.0] * 4)
    assert (found.rank, found.ratio, found.what) == (2, 2.0, "computing")
    found = slowest([1.0, 1.1, 1.0, 1.0], [0.0, 0.0, 0.0, 0.4])
    assert (found.rank, found.ratio, found.what) == (3, pytest.approx(8.0), "reading data")
    assert slowest([1.0, 1.1], [0.0, 0.04]).what == "computing"  # waiting that holds up nobody


def test_a_node_speaks_once_for_ranks_that_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Half a minute after a step has taken too long, and only if no watchdog has spoken of that hang."""
    pulses, begun, moments, looks = Pulses.make(), time.monotonic(), itertools.count(1), itertools.count()
    ranks, watch = Pulses(pulses.path), NodeWatch(pulses, "node-1")

    def look(left: float, seconds: int) -> str:
        """What is said in so many seconds, each with a look, after a rank's own."""
        ranks.write(1, Pulse(3, os.getpid(), next(looks), "step 9", left, 7.0))
        for moment in islice(moments, seconds):
            watch.look(begun + moment)
        return capsys.readouterr().out

    assert look(-1, 29) == "", "its watchdog may speak yet"
    watch.somebody_spoke()
    assert look(-100, 40) == "", "a watchdog has spoken"
    assert look(5, 5) == "", "the step has ended after all"
    said = look(-31, 2)
    assert "step 9 takes 31 s longer than it may, and no watchdog has spoken; node-1 sees of its ranks:\n" in said
    assert f"rank 3 on node-1, step 9; process {os.getpid()}: state " in said, "of this hang none has"
    assert look(-100, 6) == "" and not watch.gave_up, "once is enough"
    assert look(5, 1) == "" and "takes 31 s longer" in look(-31, 1), "and once for each hang"
    assert look(-100, 7) == "" and not watch.gave_up, "in their time of grace"
    assert look(-100, 1) == "" and watch.gave_up, "and after it"
    ranks.write(1, None)
    assert pulses.read() == {}


def test_time_in_which_the_node_itself_stood_still_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    pulses, begun = Pulses.make(), time.monotonic()
    watch = NodeWatch(pulses, "node-1")
    pulses.write(0, Pulse(0, os.getpid(), 1, "step 9", 5.0, None))
    for moment in (1, 2, 3600):
        watch.look(begun + moment)
    assert capsys.readouterr().out == ""


def test_a_child_is_there_until_it_is_dead() -> None:
    """Not gone between the two, when its environment cannot be read any more: how it ended would be lost."""
    for _ in range(40):
        with subprocess.Popen(["sleep", "1000"]) as child:
            child.kill()
            while True:
                (seen,) = (one for one in children(os.getpid()) if one.pid == child.pid)
                if not seen.alive:
                    break
            assert seen.status == -signal.SIGKILL


def test_the_folder_of_a_start(tmp_path: Path) -> None:
    folder = HealthFolder(tmp_path, "7-0")
    assert (folder.alarm(), folder.suspects(), folder.told(), folder.node(0)) == ("", [], [], {})
    folder.make()
    folder.raise_alarm("now")
    folder.write_node(1, {2: "state S"})
    folder.write("verdict-1.txt", "who")
    folder.write_suspects(["node-2"])
    again = HealthFolder(tmp_path, "7-0")
    assert again.alarm() == "now" and again.node(1) == {2: "state S"} and again.verdict(1) == "who"
    assert again.suspects() == ["node-2"] and len(again.told()) == 1
    assert not HealthFolder(tmp_path, "7-1").told()
