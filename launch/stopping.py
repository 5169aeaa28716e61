"""Stops a run before its end: a signal asks for it, all ranks agree on a step, and the run saves there.

The job script sends SIGUSR2 ahead of a time limit or a preemption. Slurm itself sends SIGTERM, and Ctrl-C is SIGINT. A
signal reaches the ranks at different steps, so no rank acts on its own.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from launch.environment import Place
from launch.health.processes import children, local_rank
from launch.standard_output import say

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Whether this process was asked to stop. Made in the main thread, before the model is built.

    A thread receives the signals, because the main thread may be inside a collective that a dead rank never joins.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._asked = threading.Event()
        self._interrupted = False
        self._signals, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender  # kept open
        signal.set_wakeup_fd(sender.fileno())
        for number in SIGNALS:
            # A job in the background does not hear Ctrl-C; the others are ignored by what starts a rank, not for it.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=_hear_nothing)
        # Launchers that must survive these signals block them, and what they start inherits that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._asked.is_set()

    def _listen(self) -> None:
        while number := self._signals.recv(1):
            if number[0] == signal.SIGTERM and self._a_rank_of_this_node_is_gone():
                os._exit(128 + signal.SIGTERM)  # the launcher is clearing up; nothing can be agreed on any more
            if number[0] == signal.SIGINT:
                self._interrupt()
            if number[0] in SIGNALS:
                self._asked.set()

    def _interrupt(self) -> None:
        """A second Ctrl-C ends this process, whatever it is doing."""
        if self._interrupted:
            os._exit(128 + signal.SIGINT)
        self._interrupted = True
        if self._place.rank == 0:
            say("interrupted: stopping after this step, with a checkpoint; once more ends it at once")

    def _a_rank_of_this_node_is_gone(self) -> bool:
        present = {local_rank(child) for child in children(os.getppid()) if child.alive}
        return self._place.local_size > 1 and len(present - {None}) < self._place.local_size


def _hear_nothing() -> None:
    """In a forked child: its signals are not the run's."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


class StopVote:
    """The ranks' common answer, called once a step by every rank: True at the same step everywhere.

    The flag travels over gloo, on the host, while the next step computes, so that nobody waits for it: a request is
    answered one step late.
    """

    def __init__(self, requested: Callable[[], bool]) -> None:
        """`requested` is this rank's own view. Collective: makes a process group."""
        self._requested = requested
        self._group = dist.new_group(backend="gloo", group_desc="stopping")
        self._flag = torch.tensor(0)
        self._travelling: dist.Work | None = None

    def __call__(self) -> bool:
        """Whether any rank had been asked to stop when all of them called this the last time."""
        if self._travelling is not None:
            self._travelling.wait()
        stop = bool(self._flag)
        self._flag = torch.tensor(int(self._requested()))
        self._travelling = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
