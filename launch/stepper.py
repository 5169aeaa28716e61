"""Steps and evaluates with one rank's engine. The trainer decides when, and handles the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.profiler import record_function

from launch.config import JobConfig
from launch.data.batches import MicroBatch
from launch.feed import Cutter, HostBatch
from launch.monitoring.timing import StepTimer
from launch.monitoring.tracing import OPTIMIZER
from launch.schedule import learning_rate_at
from launch.step_outcome import StepOutcome
from parallel.mesh import ParallelMesh
from parallel.zero import ZeroEngine


class Stepper:
    """All ranks step and evaluate together. It knows no layout."""

    def __init__(self, job: JobConfig, mesh: ParallelMesh, engine: ZeroEngine):
        self.job, self.mesh, self.engine = job, mesh, engine
        self.timer = StepTimer(engine.device)
        """Times the parts of each step."""
        self._cutter = Cutter.of(job, mesh, engine.device)

    def cut(self, micro_batches: Iterable[MicroBatch]) -> list[HostBatch]:
        """This rank's part of each, on the host."""
        return [self._cutter.cut(batch) for batch in micro_batches]

    def train(self, step: int, micro_batches: Sequence[HostBatch]) -> StepOutcome:
        """One optimizer step on one global batch; starts the work and does not wait for it."""
        engine, group = self.engine, self.mesh.zero_group
        tokens = torch.tensor(sum(batch.token_count for batch in micro_batches), dtype=torch.float32)
        tokens = tokens.to(engine.device, non_blocking=True)
        dist.all_reduce(tokens, group=group)
        # DeepSpeed divides by the accumulation steps and averages over dp x cp; what is wanted is a mean over tokens.
        scale = len(micro_batches) * self.mesh.zero_size / tokens.clamp(min=1)
        local_loss = torch.zeros((), device=engine.device)
        for batch in micro_batches:
            loss_sum, _ = engine(*batch.to(engine.device))
            engine.backward(loss_sum * scale)
            local_loss += loss_sum.detach()
        self.timer.mark("compute")
        with record_function(OPTIMIZER):
            applied = engine.step(self.learning_rate(step))
        self.timer.mark("optimizer")
        loss = local_loss.clone()
        dist.all_reduce(loss, group=group)
        return StepOutcome(
            step + 1,
            applied=applied,
            loss=loss / tokens.clamp(min=1),
            local_loss=local_loss,
            grad_norm=engine.grad_norm,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> float:
        """Mean loss over global `batches`, of which each holds this rank's micro-batches; nats per token."""
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for micro_batches in batches:
            for batch in map(self._cutter.cut, micro_batches):
                loss_sum, token_count = self.engine(*batch.to(self.engine.device))
                totals += torch.stack([loss_sum.double(), token_count.double()])
        self.engine.train()
        dist.all_reduce(totals, group=self.mesh.zero_group)
        return (totals[0] / totals[1]).item()

    def is_sound(self, outcome: StepOutcome) -> bool:
        """Whether loss and gradient are numbers. Waits for the step; the same on every rank."""
        # DeepSpeed skips such an update in any precision; only a scaler makes that right, by lowering its scale.
        skipped_by_scaler = not outcome.applied and bool(self.engine.loss_scaler_state)
        return math.isfinite(outcome.loss) and (math.isfinite(outcome.grad_norm) or skipped_by_scaler)

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update that `step` (counted from 0) makes."""
        return learning_rate_at(step, self.job.optimizer, self.job.total_steps)
