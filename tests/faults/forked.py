"""A job whose ranks are forked from one server that has imported everything, without the launcher: it starts in a
second, so that a test can afford to kill it often. What the launcher does to the survivors, `lose` does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.distributed.harness import PRELOADED, free_port
from tests.faults.launched import INJECTED, PATIENCE, TRAIN, Started, TinyJob, fault_variable


class Forked(Started):
    """The ranks of one job."""

    def __init__(self, tiny: TinyJob, processes: int, *overrides: str, fault: Mapping[str, Any] | None = None):
        """`fault` as `injected/sitecustomize.py` describes it."""
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log = tiny.folder / f"log-{uuid.uuid4().hex}"
        self.log.touch()
        world = {"WORLD_SIZE": processes, "LOCAL_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = free_port()
        arguments = ["--config", str(tiny.config), *overrides]
        self._ranks = []
        for rank in range(processes):
            variables = {key: str(value) for key, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            variables |= fault_variable(fault)
            self._ranks.append(context.Process(target=_rank, args=(arguments, tiny.folder, self.log, variables)))
            self._ranks[-1].start()

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join()

    def __len__(self) -> int:
        return len(self._ranks)

    def ended(self) -> bool:
        return all(process.exitcode is not None for process in self._ranks)

    def wait(self) -> int:
        """0 if every rank ended well. Raises AssertionError with the output if the job does not end in time."""
        deadline = time.monotonic() + PATIENCE
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"still running after {PATIENCE} s:\n{self.output[-8000:]}"
        return max(abs(process.exitcode) for process in self._ranks)

    def exit_status(self, rank: int) -> int:
        """Once it has ended."""
        self.until(lambda: self._ranks[rank].exitcode is not None)
        return int(self._ranks[rank].exitcode)

    def resume(self, rank: int) -> None:
        """SIGCONT."""
        os.kill(self._ranks[rank].pid, signal.SIGCONT)

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        self._ranks[rank].kill()

    def lose(self, ranks: Sequence[int], noticed_after: float) -> None:
        """Kills `ranks`; the launcher notices after so many seconds and sends the others SIGTERM."""
        for rank in ranks:
            self.kill(rank)
        time.sleep(noticed_after)
        for process in self._ranks:
            process.terminate()
        self.wait()

    def died(self, rank: int) -> bool:
        """By SIGKILL."""
        return self._ranks[rank].exitcode == -signal.SIGKILL


def _rank(arguments: list[str], folder: Path, log: Path, variables: dict[str, str]) -> None:
    """One rank's process, as `python -u launch/train.py` would be it."""
    os.chdir(folder)
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(variables)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(INJECTED / "sitecustomize.py"))
    from launch.train import main

    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)
