"""Ranks that do not find each other say where they wait, once, and end."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from launch import rendezvous
from launch.environment import Place
from launch.exit_status import STOPPED
from launch.rendezvous import NobodyMet, join_world

ROOT = Path(__file__).resolve().parents[2]
SECOND = Place(4, 0, 8, 4, "node-1.cluster", 29500)


class Clock:
    """Stands in for time: only sleeping takes any."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rendezvous, "time", clock)
    monkeypatch.setattr(rendezvous, "initialize_distributed", lambda _: None)
    return clock


def known_from(moment: float, clock: Clock) -> Any:
    def getaddrinfo(*_: object) -> list:
        if clock.now < moment:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    return getaddrinfo


@pytest.mark.parametrize(("moment", "rank", "lines"), [(5, SECOND, 0), (40, SECOND, 1), (40, Place(5, 1, 8, 4), 0)])
def test_a_name_that_is_late_is_waited_for(
    moment: float,
    rank: Place,
    lines: int,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", known_from(moment, clock))
    join_world("cpu", rank)
    said = capsys.readouterr().err
    assert clock.now == moment and said.count("warning: ") == said.count("\n") == lines
    if lines:
        assert "cannot resolve MASTER_ADDR=node-1.cluster ([Errno -2] Name or service not known), and goes on" in said


def test_a_name_that_stays_unknown_ends_the_rank(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", known_from(1e9, clock))
    with pytest.raises(NobodyMet, match=r"MASTER_ADDR=node-1.cluster .* nor could it for 300 s; give a name that all"):
        join_world("cpu", SECOND)
    assert 300 <= clock.now < 302


def test_a_rank_that_meets_nobody_says_where_it_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, warn = threading.Event(), rendezvous._warn

    def warned(text: str, place: Place) -> None:
        warn(text, place)
        said.set()

    def alone(_: str) -> None:
        assert said.wait(60)
        raise DistNetworkError("the client socket has timed out")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(rendezvous, "_ALONE_SECONDS", 0.01)
    monkeypatch.setattr(rendezvous, "_warn", warned)
    monkeypatch.setattr(rendezvous, "initialize_distributed", alone)
    with pytest.raises(NobodyMet, match=r"rank 4 on .* at node-1.cluster:29500 .*timed out; see that all 8"):
        join_world("cpu", SECOND)
    assert "s for the other ranks at node-1.cluster:29500 (MASTER_ADDR" in capsys.readouterr().err


def test_a_rank_that_waits_for_nobody_ends_when_it_is_asked_to_stop() -> None:
    """In a name server's answer that does not come, and in torch's own wait for the other ranks."""
    code = """
        import os, signal, socket, time
        from launch import rendezvous
        from launch.environment import Place
        from launch.stopping import StopRequests

        def begun(call):
            def called(*arguments):
                os.write(tell, b"x")
                return call(*arguments)
            return called

        rendezvous._LAST_SECONDS = 0.1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for asks in (signal.SIGTERM, signal.SIGUSR2):
            ready, tell = os.pipe()
            if not (rank := os.fork()):
                if asks == signal.SIGTERM:
                    socket.getaddrinfo = begun(lambda *_: time.sleep(600))
                rendezvous.initialize_distributed = begun(rendezvous.initialize_distributed)
                rendezvous.join_world("cpu", Place(0, 0, 2, 1), StopRequests(Place(0, 0, 2, 1)))
            os.read(ready, 1)
            os.kill(rank, asks)
            print("status", os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]), flush=True)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.count(f"status {STOPPED}\n") == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("was asked to stop, and ends: it had met nobody yet") == 2
