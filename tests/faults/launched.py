"""A job started by the real launcher, and everything a test may ask of it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.distributed.harness import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
INJECTED = Path(__file__).resolve().parent / "injected"
MARK = "RINGZERO_TEST_JOB"
PATIENCE = 600.0
"""Seconds that a tiny job may take on a machine that has more to do, start included."""


class Started(ABC):
    """A job that was started: what it says, and waiting for its moments. A context manager: none of its processes
    outlives the block."""

    log: Path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @abstractmethod
    def end(self) -> None:
        """Leaves no process of the job."""

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @abstractmethod
    def ended(self) -> bool:
        """Whether no moment is to be expected any more."""

    def until(self, condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
        """The condition's first true value. Raises AssertionError if the job ends first or time runs out."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if value := condition():
                return value
            assert not self.ended(), f"ended before the moment came:\n{self.output[-8000:]}"
            time.sleep(0.002)
        raise AssertionError(f"the moment did not come in {timeout} s:\n{self.output[-8000:]}")

    def until_said(self, words: str) -> None:
        self.until(lambda: words in self.output)


class Launched(Started):
    """One started command.

    Processes are known by a variable in their environment, which they inherit, so that orphans are found too.
    """

    def __init__(self, command: list[str], cwd: Path, environment: Mapping[str, str] | None = None):
        self.mark = uuid.uuid4().hex
        self.log = cwd / f"log-{self.mark}"
        inherited = {key: value for key, value in os.environ.items() if key not in {"WORLD_SIZE", "RANK", "FAULT"}}
        settings = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{INJECTED}:{ROOT}",
            MARK: self.mark,
        }
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=inherited | settings | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> None:
        while alive := self.alive():
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.1)
        self._process.wait()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def alive(self) -> list[int]:
        """Every living process of the job: launchers, ranks, and what those started."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):  # gone meanwhile
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit status. Raises AssertionError with the output if the job does not end in time."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output[-8000:]}") from None

    def seconds_to_die(self) -> float:
        """How long it takes until no process of the job is left."""
        start = time.monotonic()
        while self.alive():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.02)
            assert time.monotonic() - start < PATIENCE, f"alive: {self.alive()}\n{self.output[-8000:]}"
        return time.monotonic() - start


class TinyJob:
    """A job that trains in no time, its run directory, and the command that starts it."""

    def __init__(self, folder: Path, *, tp: int = 1, cp: int = 1, stage: int = 3, max_steps: int = 6, **sections: Any):
        import yaml

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run, self.config = folder, folder / "run", folder / "job.yaml"
        text = folder / "text"
        text.mkdir(exist_ok=True)
        for number in range(8):
            words = " ".join(str(value**3 % 1009) for value in range(number * 200, number * 200 + 400))
            (text / f"{number}.txt").write_text(words)
        job: dict[str, dict[str, Any]] = {
            "job": {"name": "tiny", "run_directory": str(self.run), "device": "cpu"},
            "model": {
                "vocab_size": 256,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "parallel": {"tensor_parallel_size": tp, "context_parallel_size": cp, "zero_stage": stage},
            "data": {"source": "files", "files": [f"{text}/*.txt"], "validation_fraction": 0.15},
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
            "training": {
                "sequence_length": 32,
                "global_batch_size": 4,
                "max_steps": max_steps,
                "evaluation_batches": 1,
            },
            "checkpoint": {"save_interval": 1, "keep_last": 3},
            "monitor": {"log_interval": 1, "tensorboard": False},
        }
        for section, values in sections.items():
            job[section] |= values
        self.config.write_text(yaml.safe_dump(job))

    def launch(self, processes: int, *overrides: str, fault: Mapping[str, Any] | None = None) -> Launched:
        """The real command on `processes` ranks; `fault` as `injected/sitecustomize.py` describes it."""
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes)]
        command += ["--master_port", str(free_port()), str(TRAIN), "--config", str(self.config), *overrides]
        return Launched(command, self.folder, fault_variable(fault))

    def alone(self, *overrides: str) -> Launched:
        """`python launch/train.py`, without a launcher: a world of one."""
        return Launched([sys.executable, str(TRAIN), "--config", str(self.config), *overrides], self.folder)

    def finish(self, processes: int, *overrides: str) -> str:
        """Runs to the end, which must be a success; the output."""
        with self.launch(processes, *overrides) as job:
            assert job.wait() == 0, job.output[-8000:]
            return job.output

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def complete(self) -> list[int]:
        """Steps whose checkpoints have their final name."""
        names = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.is_dir() else []
        return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))

    def logged(self) -> int:
        """The last whole step in metrics.jsonl, 0 before any."""
        return max(self.curve(), default=0)

    def curve(self) -> dict[int, tuple[float, float]]:
        """Step -> (loss, gradient norm), with every bit of them; whole lines only."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        entries = [json.loads(line) for line in lines]
        return {entry["step"]: (entry["loss"], entry["gradient_norm"]) for entry in entries if "loss" in entry}

    def validation(self) -> list[tuple[int, float]]:
        entries = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [(entry["step"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]


def fault_variable(fault: Mapping[str, Any] | None) -> dict[str, str]:
    """What `injected/sitecustomize.py` reads."""
    return {"FAULT": json.dumps(fault)} if fault else {}
