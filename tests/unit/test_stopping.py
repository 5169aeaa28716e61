"""Signals that ask a rank to stop, and who hears them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch.environment import Place
from launch.health.processes import Child
from launch.stopping import StopRequests

ROOT = Path(__file__).resolve().parents[2]


def test_a_signal_asks_a_second_interrupt_ends_and_a_forked_child_hears_neither() -> None:
    code = """
        import os, signal, time
        from launch.environment import Place
        from launch.stopping import SIGNALS, StopRequests
        signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may be in the background, too
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # both as a rank under Slurm inherits it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        stop = StopRequests(Place(0, 0, 1, 1))
        ready, tell = os.pipe()
        children = [(number, None, -number) for number in SIGNALS]
        for number, own, status in (*children, (signal.SIGTERM, lambda *_: os._exit(7), 7)):
            child = os.fork()
            if not child:
                if own is not None:
                    signal.signal(number, own)
                os.write(tell, b"x")
                time.sleep(600)
            os.read(ready, 1)
            os.kill(child, number)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
        signal.signal(signal.SIGUSR1, lambda *_: None)  # of some library
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)  # in which it would be heard
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR2)
        deadline = time.monotonic() + 60
        while not stop():
            assert time.monotonic() < deadline
        print("asked", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    once = "interrupted: stopping after this step, with a checkpoint; once more ends it at once"
    assert ended.stdout.splitlines() == ["asked", once] and ended.returncode == 128 + signal.SIGINT, ended.stderr


def test_each_signal_asks_but_what_a_shell_has_told_to_ignore_and_what_a_launcher_clears_up_with() -> None:
    """A launcher sends SIGTERM once another rank is gone. A process that listens can end by itself."""
    code = """
        import os, signal, time
        from launch.environment import Place
        from launch.stopping import StopRequests

        def ended(action):
            child = os.fork()
            if not child:
                try:
                    action(StopRequests(Place(1, 0, 2, 1)))  # rank 0 of another node says what there is to say
                finally:
                    os._exit(1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        def asked_by(number):
            def action(stop):
                os.kill(os.getpid(), number)
                deadline = time.monotonic() + 60
                while not stop() and time.monotonic() < deadline:
                    time.sleep(0.01)
                os._exit(7 if stop() else 1)
            return action

        def ignores(stop):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # in which it would be heard
            os._exit(1 if stop() else 7)

        def cleared_up(stop):
            stop._a_rank_of_this_node_is_gone = lambda: True
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked = [ended(asked_by(number)) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(*asked, ended(ignores), ended(cleared_up))
        StopRequests(Place(0, 0, 1, 1))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.stdout == f"7 7 7 7 {128 + signal.SIGTERM}\n" and not ended.returncode, ended.stderr


def test_a_rank_is_gone_where_its_launcher_has_fewer_living_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that the launcher has started beside them is none."""

    def gone(local_size: int, *of_launcher: Child) -> bool:
        monkeypatch.setattr("launch.stopping.children", lambda pid: iter(of_launcher if pid == os.getppid() else ()))
        stop = object.__new__(StopRequests)  # without the signals, which are this process's
        stop._place = Place(0, 0, 4, local_size)
        return stop._a_rank_of_this_node_is_gone()

    here, there, dead = (
        Child(5, alive, 0, {"LOCAL_RANK": rank}) for alive, rank in ((True, "0"), (True, "1"), (False, "1"))
    )
    helper = Child(6, True, 0, {})
    assert not gone(2, here, there) and not gone(2, here, there, helper)
    assert gone(2, here) and gone(2, here, helper) and gone(2, here, dead)
    assert not gone(1), "a rank alone has no launcher to clear up after it"
