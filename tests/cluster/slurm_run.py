"""A small job that is submitted as a user would, and what came of it."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.slurm.submission import newest_submission
from tests.cluster.slurm_cluster import NODES as CLUSTER
from tests.cluster.slurm_cluster import SlurmCluster
from tests.faults.launched import TinyJob

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
NODES = ("node-1", "node-2")
"""Of a job; Slurm gives the first that are free, and the cluster has two more."""
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "GLOO_SOCKET_IFNAME": "eth0",
    "NCCL_DEBUG": "WARN",
    "NCCL_IB_HCA": "mlx5_0,mlx5_1",  # a comma, which `srun --export=NAME=VALUE` would cut
}


class SlurmRun:
    def __init__(
        self,
        cluster: SlurmCluster,
        folder: Path,
        *overrides: str,
        steps: int = STEPS,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`processes` of each node; `environment` besides the usual."""
        self.cluster = cluster
        # Large enough that a step takes a moment to interrupt.
        self.job = TinyJob(folder, tp=processes, max_steps=steps, model={"hidden_size": 128, "num_hidden_layers": 4})
        variables = json.dumps(ENVIRONMENT | dict(environment or {}))
        self.overrides = [
            "training.sequence_length=256",
            "training.global_batch_size=12",
            "checkpoint.save_interval=0",
            "monitor.tensorboard=true",
            f"slurm.nodes={len(NODES)}",
            f"slurm.gpus_per_node={processes}",
            f"slurm.environment={variables}",
            *overrides,
        ]
        self.run = self.job.run

    def submit(self, *overrides: str, code: int = 0) -> str:
        command = [
            sys.executable,
            str(ROOT / "launch" / "submit.py"),
            str(self.job.config),
            *self.overrides,
            *overrides,
        ]
        variables = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        ended = self.cluster.run(*command, cwd=self.job.folder, environment=variables)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def start(self, *overrides: str, idle: int = len(CLUSTER)) -> int:
        """Submits, once so many nodes are idle; the first job's id."""
        return self.start_chain(*overrides, idle=idle)[0]

    def start_chain(self, *overrides: str, idle: int = len(CLUSTER)) -> list[int]:
        self.cluster.until(lambda: self.cluster.idle() == idle)
        found = re.findall(r"^job (\d+), log ", self.submit(*overrides), re.MULTILINE)
        assert found
        return [int(job) for job in found]

    def log(self, job: int) -> str:
        path = newest_submission(self.run).log(job)
        return path.read_text(errors="replace") if path.exists() else ""

    def until_step(self, step: int, job: int) -> None:
        def there() -> bool:
            if self.job.logged() >= step:
                return True
            assert self.cluster.state(job) in ("PENDING", "RUNNING", "SIGNALING", "COMPLETING"), self.log(job)
            return False

        self.cluster.until(there)

    @contextmanager
    def stopped(self, step: int, job: int, rank: int = 0) -> Iterator[None]:
        """From `step` on, or a little later, the run stands still until what the block sends has reached `rank`: it is
        not over before."""
        process = self.cluster.until(lambda: self.cluster.ranks(job).get(rank))
        self.until_step(step, job)
        with self.cluster.stopped(process):
            yield

    def until_said(self, words: str, job: int) -> None:
        self.cluster.until(lambda: words in self.log(job))

    def finish(self, job: int, state: str = "COMPLETED") -> None:
        assert self.cluster.end(job) == state, self.log(job)

    def tensorboard(self) -> list[tuple[int, float]]:
        events = EventAccumulator(str(self.run / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("train/loss")]


def assert_same_run(run: SlurmRun, undisturbed: SlurmRun) -> None:
    """Every loss and norm, and the curve that TensorBoard shows, without a seam."""
    assert sorted(run.job.curve()) == list(range(1, STEPS + 1))
    assert run.job.curve() == undisturbed.job.curve()
    assert run.job.validation() == undisturbed.job.validation()
    shown = run.tensorboard()
    assert shown == undisturbed.tensorboard() and [step for step, _ in shown] == list(range(1, STEPS + 1))
