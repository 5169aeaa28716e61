"""One node of a Slurm job: starts DeepSpeed's launcher, shows rank 0's output, and reports how a rank died.

`deepspeed --no_ssh` would start the same launcher, but it numbers a node's GPUs from 0 whichever Slurm gave, and ends
with 0 when the launcher is killed. This process and the launcher block the signals that stop a run, which are for the
ranks: the launcher would pass SIGTERM on to one rank at a time, 30 seconds apart, and die of SIGUSR2. When a rank dies,
all others of the step are killed at once. For ranks that hang and cannot report that themselves it reports. Imports no
torch.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.exit_status import HUNG, STOPPED
from launch.health.health_folder import HealthFolder
from launch.health.node_watch import PULSES, NodeWatch, Pulses
from launch.health.processes import children, die_with_parent, ranks_beside
from launch.slurm.submission import ready
from launch.standard_output import say

_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_CLEARED_UP = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Statuses of ranks that the launcher has ended."""
_LOOK_SECONDS = 0.1
_LISTEN_SECONDS = 2.0
"""Between looks at a shared file."""
_WAIT_FOR_THE_CULPRIT = 3.0
"""A rank that ended by itself may only have lost its peer on another node, which then speaks first."""
_LAST_LINES = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 also where the run was stopped and has saved."""
    parser = argparse.ArgumentParser(prog="slurm_node.py")
    parser.add_argument("--nodes", required=True, help="names, in the order of their ranks")
    parser.add_argument("--processes", required=True, type=int, help="ranks of each node")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--logs", required=True, type=Path)
    parser.add_argument("--health", required=True, type=Path, help="of this start")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- TRAIN.PY ARGUMENTS")
    options = parser.parse_args(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    node = Node(
        options.nodes.split(","), int(os.environ["SLURM_NODEID"]), options.processes, options.logs, options.health
    )
    return node.run([word for word in options.train if word != "--"], options.port)


class Node:
    """This node's launcher and ranks."""

    def __init__(self, nodes: list[str], number: int, processes: int, logs: Path, health: Path) -> None:
        self.nodes, self.number, self.processes, self.logs = nodes, number, processes, logs
        self._health = HealthFolder(health.parents[1], health.name)
        self._alarm = self._told = ""
        self._heard: dict[Path, int] = {}  # verdicts, of all nodes, and when they were written
        self._listened = time.monotonic()
        self._ranks: dict[int, int] = {}  # pid -> rank
        self._ended: dict[int, int | None] = {}  # rank -> status, in the order of their ends; None: nobody saw it
        self._logs: dict[int, Path] = {}  # by rank
        self._shown = 0
        self._ready = False

    def run(self, train: Sequence[str], port: int) -> int:
        """Starts the launcher and waits for it."""
        pulses = Pulses.make()
        os.environ[PULSES] = str(pulses.path)
        watch = NodeWatch(pulses, socket.gethostname()).start()
        launcher = subprocess.Popen(self._launcher(train, port), process_group=0, preexec_fn=die_with_parent)
        try:
            status = self._wait(launcher, watch)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        self._show()
        self._pass_on_verdict()
        if status in (0, STOPPED):
            return 0
        unseen = [rank for rank, how in self._ended.items() if how is None]
        if status > 0 and unseen:  # the launcher has asked sooner than this process, and ends as the first of them did
            self._ended[unseen[0]] = status - 256 if status > 256 - signal.NSIG else status
        self._tell_and_kill(status)
        return status if status > 0 else 128 - status

    def _wait(self, launcher: subprocess.Popen[bytes], watch: NodeWatch) -> int:
        """How the launcher ended, or that the ranks hang."""
        while (status := launcher.poll()) is None:
            self._watch(launcher.pid)
            self._show()
            self._listen(launcher.pid, watch)
            if HUNG in self._ended.values():  # the launcher would wait half a minute for each rank that is stopped
                return HUNG
            if killed := self._killed():  # nor is it waited for: other nodes are about to lose the rank, too
                return min(killed.values())
            if watch.gave_up:
                self._health.write(f"verdict-node-{self.number}.txt", watch.verdict)
                return HUNG
            time.sleep(_LOOK_SECONDS)
        return status

    def _launcher(self, train: Sequence[str], port: int) -> list[str]:
        """The command that `deepspeed` starts on each node."""
        given = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        mine = given if len(given) == self.processes else list(range(self.processes))
        world: dict[str, list[int] | list[str]] = {name: list(range(self.processes)) for name in self.nodes}
        world[self.nodes[self.number]] = mine
        return [
            *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
            f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
            f"--node_rank={self.number}",
            f"--master_addr={self.nodes[0]}",
            f"--master_port={port}",
            f"--enable_each_rank_log={self.logs}",
            "--log_level=critical",
            *train,
        ]

    def _watch(self, launcher: int) -> None:
        """Notes who ends first: the launcher looks once a second, asks nobody why, and then ends the others."""
        present = {child.pid: child for child in children(launcher)}
        for pid, child in present.items():
            if "RANK" in child.environment:
                self._ranks.setdefault(pid, int(child.environment["RANK"]))
        if not self._ready and len(self._ranks) == self.processes:
            # They have inherited that the signals are blocked: one that comes now waits until it is heard.
            ready(self.logs, self.number).touch()
            self._ready = True
        for pid, rank in self._ranks.items():
            if rank not in self._ended and (pid not in present or not present[pid].alive):
                self._ended[rank] = present[pid].status if pid in present else None

    def _show(self) -> None:
        """Passes on what rank 0 has said since."""
        path = self._log(0) if self.number == 0 else None
        if path is not None:
            with open(path, "rb") as log:
                log.seek(self._shown)
                said = log.read()
            self._shown += len(said)
            with suppress(OSError):  # the rank's own log has it
                sys.stdout.buffer.write(said)
                sys.stdout.flush()

    def _listen(self, launcher: int, watch: NodeWatch) -> None:
        """Answers a watchdog's alarm with what the ranks of this node are doing, and passes on the verdict of one."""
        if time.monotonic() - self._listened < _LISTEN_SECONDS:
            return
        self._listened = time.monotonic()
        try:
            alarm = self._health.alarm()
            if alarm != self._alarm:
                self._health.write_node(self.number, ranks_beside(launcher))
                self._alarm = alarm
            told = {path: path.stat().st_mtime_ns for path in self._health.told()} if alarm else {}
            if told != self._heard:
                self._heard = told
                watch.somebody_spoke()
            self._pass_on_verdict()
        except OSError as error:
            say(f"{self._health.path}: {error}")

    def _pass_on_verdict(self) -> None:
        """Unless it is rank 0's, whose output is shown anyway."""
        for rank in range(max(1, self._first), self._last + 1) if self._alarm else ():
            verdict = self._health.verdict(rank)
            if verdict and verdict != self._told:
                self._told = verdict
                say(verdict.rstrip("\n"))

    def _tell_and_kill(self, status: int) -> None:
        """Reports which rank died and how, then ends the rest of the step on all nodes."""
        if status != HUNG:
            self._tell(status)
        time.sleep(0.5)  # for srun to have read it
        step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
        with suppress(OSError):  # in a container without Slurm; srun ends the others, less quickly
            subprocess.run(["scancel", "--signal=KILL", step], check=False)

    def _tell(self, status: int) -> None:
        dead = {rank: how for rank, how in self._ended.items() if how not in (0, *_CLEARED_UP)}
        by_signal: dict[int, int | None] = {**self._killed()}
        if not by_signal:
            time.sleep(_WAIT_FOR_THE_CULPRIT)
        host = socket.gethostname()
        culprits = by_signal or dict(list(dead.items())[:1])
        for rank, how in culprits.items():
            say(self._obituary(rank, how, host))
        if not culprits:
            say(f"the launcher of {host} (ranks {self._first} to {self._last}) ended with {status}")

    def _killed(self) -> dict[int, int]:
        """Rank -> status of those that a signal ended, other than the launcher's, in the order of their ends."""
        ended = self._ended.items()
        return {rank: how for rank, how in ended if how is not None and how < 0 and how not in _CLEARED_UP}

    def _obituary(self, rank: int, how: int | None, host: str) -> str:
        if how is None:
            died = "died"
        elif how < 0:
            died = f"was killed by signal {-how} ({signal.Signals(-how).name})"
        else:
            died = f"ended with exit status {how}"
        path = self._log(rank)
        lines = path.read_text(errors="replace").splitlines() if path else []
        quoted = [f"    {line}" for line in lines[-_LAST_LINES:]] or ["    (nothing)"]
        return "\n".join([f"rank {rank} on {host} {died}; the last it said, all of it in {path}:", *quoted])

    def _log(self, rank: int) -> Path | None:
        """Looked for until it is there: to list a shared folder ten times a second would burden its server."""
        for path in self.logs.glob(f"*_rank{rank}.log") if rank not in self._logs else ():
            self._logs[rank] = path
        return self._logs.get(rank)

    @property
    def _first(self) -> int:
        return self.number * self.processes

    @property
    def _last(self) -> int:
        return self._first + self.processes - 1


if __name__ == "__main__":
    sys.exit(main())
