"""Controls a Slurm job from its first node: `slurm_job.py SUBMISSION [--followed]`. The job script becomes this
process.

It starts one launcher on each node (`launch/slurm_node.py`), and passes Slurm's warning on to the ranks, which save and
end. Then it queues the job again, at most slurm.max_restarts times and only while it makes progress. A job that failed
is not queued again. Imports no torch, so that it runs within a second of the job's start.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.health.health_folder import HealthFolder
from launch.plurals import counted
from launch.slurm.submission import Submission, point_latest, ready
from launch.slurm.world import meeting_port
from launch.standard_output import say

_DEAF = ("sh", "-c", 'trap "" USR2 TERM; exec "$@"', "sh")
"""Slurm signals all processes of a step, what starts a container included; only the ranks are to hear it."""
_LOOK_SECONDS = 0.2
_PASS_ON_SECONDS = 2.0
"""Between attempts to pass a warning on, which fail while Slurm's controller is away."""
_SECONDS_TO_BE_KILLED = 120
"""How long Slurm may take to end this process after it has queued the job again."""
_AWAY = ("Unable to contact slurm controller", "Socket timed out")
"""What Slurm's commands say while the controller is restarted, replaced by its backup, or overloaded."""
_AWAY_SECONDS, _ASK_SECONDS = 900.0, 5.0
"""How long that may last, and how often it is asked meanwhile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    stop = StopSignals()
    parser = argparse.ArgumentParser(prog="slurm_job.py")
    parser.add_argument("submission", type=Path)
    parser.add_argument("--followed", action="store_true", help="another job continues where this one stops")
    options = parser.parse_args(arguments)
    return Slice(Submission.read(options.submission), stop).run(followed=options.followed)


class StopSignals:
    """Hears Slurm's warning, and its SIGTERM, from the moment on when this is made."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, why: str) -> None:
        """All ranks are to save and stop."""
        self.asked = True
        _say(f"{why}: asking all ranks to save and stop")


class Slice:
    """One start of a job, to the moment when it ends or is queued again."""

    def __init__(self, submission: Submission, stop: StopSignals) -> None:
        self.submission, self.stop = submission, stop
        self.job_id, self.restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.health = HealthFolder(submission.run, f"{self.job_id}-{self.restart}")

    def run(self, *, followed: bool) -> int:
        """The job's exit status. Where the job is queued again, Slurm ends this process instead."""
        listing = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        nodes = subprocess.run(listing, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        started_from = self.submission.saved_step()
        self.submission.note_start(
            job=self.job_id, restart=self.restart, step=started_from, nodes=nodes, excluded=self._excluded()
        )
        _say(f"job {self.job_id}, restart {self.restart}, from step {started_from} on {' '.join(nodes)}")
        if not self.stop.asked and self._fact("PreemptTime") is not None:
            # The shell that became this process ignores the warning, and may have been busy with modules for long.
            self.stop.ask("preempted before this process could hear it")
        status = 0 if self.stop.asked else self._train(nodes)
        step, total = self.submission.saved_step(), self.submission.total_steps
        # One that is only told may have passed long before.
        hung = self.submission.ends_hangs and bool(self.health.told())
        if status and not hung:
            _say(f"job {self.job_id} failed, exit status {status}; last checkpoint: step {step}")
            return status
        if step >= total:
            _say(f"job {self.job_id} is done: step {step} of {total}")
            return 0
        _say(f"job {self.job_id} {'hung, and' if status else 'was'} stopped at step {step} of {total}")
        return 0 if followed else self._queue_again(step)

    def _train(self, nodes: list[str]) -> int:
        submission = self.submission
        logs = submission.folder / f"{self.job_id}-{self.restart}"
        logs.mkdir(exist_ok=True)
        point_latest(logs)
        # srun hands a step one CPU unless told (since Slurm 22.05), and may bind all ranks of a node to it.
        cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
        command = [
            "srun",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            *([f"--cpus-per-task={cpus}"] if cpus else []),
            "--cpu-bind=none",
            "--export=ALL",
            "--kill-on-bad-exit=1",
            *submission.srun_options,
            *_DEAF,
            *submission.container,
            *(submission.python, "-u", submission.node_script),
            *("--nodes", ",".join(nodes), "--processes", str(submission.processes_per_node)),
            *("--port", str(meeting_port(int(self.job_id), self.restart)), "--logs", str(logs)),
            *("--health", str(self.health.path)),
            *("--", submission.train_script, "--config", str(submission.config)),
        ]
        step = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        passed_on, attempted = False, -math.inf
        while (status := step.poll()) is None:
            due = self.stop.asked and not passed_on and time.monotonic() - attempted > _PASS_ON_SECONDS
            # A signal that came sooner would find no step, or no ranks in it.
            if due and all(ready(logs, node).exists() for node in range(len(nodes))):
                # Its steps, not this process.
                passed_on = subprocess.run(["scancel", "--signal=USR2", self.job_id], check=False).returncode == 0
                attempted = time.monotonic()
            time.sleep(_LOOK_SECONDS)
        return status

    def _queue_again(self, step: int) -> int:
        """Only returns if the job is not queued again."""
        limit, idle = self.submission.max_restarts, self.submission.idle_slices(step)
        avoided = self.health.suspects() if self.submission.exclude else []
        state = self._fact("JobState")
        if state not in ("RUNNING", "SIGNALING"):  # the second, while a warning is on its way
            _say(f"not queued again: Slurm has it as {state or 'unknown'}")
        elif self.restart >= limit:
            restarted = counted(self.restart, "time")
            _say(f"not queued again: restarted {restarted} of slurm.max_restarts ({limit}); submit it again")
        elif idle >= self.submission.max_idle_slices and not avoided:
            _say(
                f"not queued again: {counted(idle, 'start')} from step {step} brought no new checkpoint "
                f"(slurm.max_idle_slices is {self.submission.max_idle_slices}); raise slurm.time, or lower "
                "checkpoint.save_interval"
            )
        else:
            _say(f"queueing job {self.job_id} again" + (f", without {' '.join(avoided)}" if avoided else ""))
            before = self._excluded()
            # Slurm ends this process by SIGTERM, but only a job that is queued can be told which nodes to avoid.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if avoided else signal.SIG_DFL)
            if _slurm("scontrol", "requeue", self.job_id).returncode == 0:
                if avoided:
                    self._avoid([*before, *avoided])
                time.sleep(_SECONDS_TO_BE_KILLED)
            _say("Slurm did not queue the job again; submit it again")
        return 1

    def _avoid(self, nodes: list[str]) -> None:
        """Keeps the queued job from `nodes`, and ends this process, for whose end Slurm waits."""
        if _slurm("scontrol", "update", f"JobId={self.job_id}", f"ExcNodeList={','.join(nodes)}").returncode:
            _say(f"Slurm did not exclude {' '.join(nodes)}; the job may get them again")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _excluded(self) -> list[str]:
        """Nodes that the job must not get, in Slurm's own shorthand."""
        listed = self._fact("ExcNodeList")
        return [listed] if listed is not None else []

    def _fact(self, name: str) -> str | None:
        """What Slurm reports about this job; None if it reports nothing."""
        found = re.search(rf"\b{name}=(\S+)", _slurm("scontrol", "show", "job", "--oneliner", self.job_id).stdout)
        return found[1] if found and found[1] not in ("(null)", "None") else None


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm's, and again for as long as its controller is away: a job that has lasted for days is not
    to be lost to that minute."""
    deadline = time.monotonic() + _AWAY_SECONDS
    while True:
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.stderr:
            _say(f"{command[0]}: {ended.stderr.strip()}")
        away = ended.returncode != 0 and any(words in ended.stderr for words in _AWAY)
        if not away or time.monotonic() > deadline:
            return ended
        time.sleep(_ASK_SECONDS)


def _say(text: str) -> None:
    say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")


if __name__ == "__main__":
    sys.exit(main())
