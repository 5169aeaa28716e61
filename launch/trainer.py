"""The training loop: batches in, updates out, and what is told and saved on the way. It knows no layout."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from launch.config import JobConfig
from launch.data.batches import Batches, MicroBatch
from launch.data.prefetch import Prefetcher
from launch.feed import Cutter, HostBatch
from launch.health.pace import STEP, Pace
from launch.health.stragglers import Stragglers
from launch.monitoring.monitor import Monitor, StepRecord
from launch.monitoring.timing import StepTimer
from launch.monitoring.tracing import DATA, OPTIMIZER, StepTracer
from launch.saving.checkpoint import Checkpoints
from launch.saving.checkpoint_records import Progress, Saved
from launch.saving.continuity import LAST_LOSSES, unlike_recent
from launch.schedule import learning_rate_at
from parallel.mesh import ParallelMesh
from parallel.zero import ZeroEngine


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or not a number; going on would only waste the job's time."""


@dataclass(frozen=True)
class StepOutcome:
    """One step's results, still on the device: reading them waits for the step."""

    step: int
    """Updates done, this one included."""
    loss: Tensor
    """Mean over the global batch's tokens, nats."""
    local_loss: Tensor
    """This rank's summed loss, to tell which rank went wrong."""
    grad_norm: Tensor | float
    applied: bool
    """False where a loss scaler skipped the update."""


class Trainer:
    """One run of one job on one rank. All ranks call `run` together."""

    def __init__(
        self,
        job: JobConfig,
        mesh: ParallelMesh,
        engine: ZeroEngine,
        training: Batches,
        validation: Callable[[], Iterator[list[MicroBatch]]],
        monitor: Monitor,
        checkpoints: Checkpoints,
        validation_facts: dict[str, float],
        stop: Callable[[], bool] = lambda: False,
        pace: Pace | None = None,
        stragglers: Stragglers | None = None,
    ):
        """`validation()` yields the same micro-batches at every call; `validation_facts` are logged beside its loss.

        `stop()` is asked once a step, and answers the same on every rank: save and return early. `pace` is told what
        begins, for a watchdog that looks at it; without `stragglers` slow ranks are not looked for.
        """
        self.job, self.mesh, self.engine = job, mesh, engine
        self.cutter = Cutter.of(job, mesh, engine.device)
        self.training, self.validation, self.validation_facts = training, validation, validation_facts
        self.monitor, self.checkpoints, self.stop = monitor, checkpoints, stop
        self.pace, self.stragglers = pace or Pace.of(job), stragglers
        self.timer = StepTimer(engine.device)
        self.tracer = StepTracer(job.profile.steps, job.run_path / "trace", dist.get_rank())
        self._losses: dict[str, float] = {}
        self._expected: dict[str, float] | None = None

    def run(self, progress: Progress, losses: Mapping[str, float] | None = None) -> Progress:
        """Trains from `progress` to the end; evaluates and saves at the configured intervals and at the end, and saves
        where it is told to stop. Returns how far it came.

        `losses` are the last ones before a resume: step -> loss. Raises NonFiniteLoss, and CheckpointError if the last
        save fails (an earlier one does as checkpoint.on_save_error says).
        """
        total, start = self.job.total_steps, progress.step
        self._losses = self._expected = dict(losses or {})
        evaluation, saving = self.job.training.evaluation_interval, self.job.checkpoint.save_interval
        unchecked: StepOutcome | None = None
        logged_at, logged_step = time.perf_counter(), start
        with Prefetcher(self._load, stop=total) as batches:
            for step in range(start, total):
                self.pace.begin(STEP, step + 1)
                self.tracer.before(step + 1)
                self.timer.start()
                with record_function(DATA):
                    micro_batches = batches.get(step)
                self.timer.mark("data")
                outcome = self.train_step(step, micro_batches)
                traced = self.tracer.after(outcome.step)
                if traced:
                    self.monitor.message(traced)
                # Checked one step late: by then the values are there, and reading them does not hold up the device.
                if unchecked is not None:
                    self._check_finite(unchecked)
                unchecked = outcome
                progress = replace(progress, step=outcome.step, tokens=progress.tokens + self.job.tokens_per_step)
                self.monitor.advance(outcome.step)
                last = outcome.step == total
                stopping = self.stop() and not last
                if outcome.step % self.job.monitor.log_interval == 0 or last:
                    self._check_finite(outcome)
                    parts = self.timer.collect()
                    seconds = (time.perf_counter() - logged_at) / (outcome.step - logged_step)
                    self._log(outcome, progress, seconds, parts)
                    limit = self.pace.note()
                    if limit:
                        self.monitor.message(limit)
                    self._report(self.checkpoints.outcome(wait=False))
                    logged_at, logged_step = time.perf_counter(), outcome.step
                interrupted = time.perf_counter()
                if last or (evaluation and outcome.step % evaluation == 0):
                    self._check_finite(outcome)
                    self.pace.begin("evaluation", outcome.step)
                    self._log_validation(outcome.step)
                if last or stopping or (saving and outcome.step % saving == 0):
                    self._check_finite(outcome)
                    self.pace.begin("checkpoint", outcome.step)
                    self.timer.mark("")
                    self._save(progress, last=last or stopping)
                    self.timer.mark("checkpoint")
                logged_at += time.perf_counter() - interrupted  # evaluating and saving are not part of a step's time
                if stopping:
                    self.monitor.message(
                        f"stopped after step {outcome.step} of {total}, as asked by a signal or a watchdog"
                    )
                    break
        self.pace.begin("the end", progress.step)
        if start >= total:
            self.monitor.message(f"step {start} of {total}: this run is already complete")
            self._log_validation(start)
        return progress

    def train_step(self, step: int, micro_batches: list[HostBatch]) -> StepOutcome:
        """One optimizer step on one global batch; starts the work and does not wait for it."""
        engine, group = self.engine, self.mesh.zero_group
        tokens = torch.tensor(sum(batch.token_count for batch in micro_batches), dtype=torch.float32)
        tokens = tokens.to(engine.device, non_blocking=True)
        dist.all_reduce(tokens, group=group)
        # DeepSpeed divides by the accumulation steps and averages over dp x cp; what is wanted is a mean over tokens.
        scale = len(micro_batches) * self.mesh.zero_size / tokens.clamp(min=1)
        local_loss = torch.zeros((), device=engine.device)
        for batch in micro_batches:
            loss_sum, _ = engine(*batch.to(engine.device).arguments())
            engine.backward(loss_sum * scale)
            local_loss += loss_sum.detach()
        self.timer.mark("compute")
        with record_function(OPTIMIZER):
            applied = engine.step(self._learning_rate(step))
        self.timer.mark("optimizer")
        loss = local_loss.clone()
        dist.all_reduce(loss, group=group)
        return StepOutcome(step + 1, loss / tokens.clamp(min=1), local_loss, engine.grad_norm, applied)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the validation batches, nats per token."""
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for micro_batches in self.validation():
            for batch in map(self.cutter.cut, micro_batches):
                loss_sum, token_count = self.engine(*batch.to(self.engine.device).arguments())
                totals += torch.stack([loss_sum.double(), token_count.double()])
        self.engine.train()
        dist.all_reduce(totals, group=self.mesh.zero_group)
        return (totals[0] / totals[1]).item()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _load(self, step: int) -> list[HostBatch]:
        return [self.cutter.cut(batch) for batch in self.training.micro_batches(step)]

    def _learning_rate(self, step: int) -> float:
        optimizer = self.job.optimizer
        return learning_rate_at(
            step,
            peak=optimizer.learning_rate,
            warmup_steps=optimizer.warmup_steps,
            total_steps=self.job.total_steps,
            schedule=optimizer.schedule,
            min_ratio=optimizer.min_learning_rate_ratio,
            decay_fraction=optimizer.decay_fraction,
        )

    def _check_finite(self, outcome: StepOutcome) -> None:
        """Every rank sees the same loss and norm, so all stop together."""
        loss, norm = float(outcome.loss), float(outcome.grad_norm)
        self._remember(outcome.step, loss)
        # DeepSpeed skips such an update in any precision; only a scaler makes that right, by lowering its scale.
        skipped_by_scaler = not outcome.applied and bool(self.engine.loss_scaler_state)
        if math.isfinite(loss) and (math.isfinite(norm) or skipped_by_scaler):
            return
        flags = torch.zeros(dist.get_world_size(), device=self.engine.device)
        flags[dist.get_rank()] = float(not math.isfinite(float(outcome.local_loss)))
        dist.all_reduce(flags)
        ranks = [str(rank) for rank, flag in enumerate(flags.tolist()) if flag]
        where = f"on rank {', '.join(ranks)}" if ranks else "in the gradients only"
        self._report(self.checkpoints.outcome(wait=True))
        # A checkpoint of the step before holds the very weights that failed; those before it led to a sound step.
        steps = self.checkpoints.steps()
        sound = [step for step in steps if step < outcome.step - 1]
        good = f"step-{sound[-1]:08d} in {self.checkpoints.storage.location}" if sound else "none"
        if sound and sound != steps:
            good += f" (move step-{steps[-1]:08d} away to continue from it)"
        raise NonFiniteLoss(
            f"step {outcome.step}: loss {loss}, gradient norm {norm}; it arose {where}. Last good checkpoint: {good}. "
            "Lower optimizer.learning_rate or training.gradient_clipping, lengthen optimizer.warmup_steps, or look at "
            "the data of this step"
        )

    def _log(self, outcome: StepOutcome, progress: Progress, seconds: float, parts: dict[str, float]) -> None:
        scaler = self.engine.loss_scaler_state
        slow = self.stragglers.look(parts.get("data", 0.0)) if self.stragglers else None
        self.monitor.log_step(
            StepRecord(
                step=outcome.step,
                loss=float(outcome.loss),
                gradient_norm=float(outcome.grad_norm),
                learning_rate=self._learning_rate(outcome.step - 1),
                tokens=progress.tokens,
                seconds=seconds,
                parts=parts,
                peak_memory_bytes=_peak_memory(self.engine.device),
                stragglers=slow.scalars if slow else {},
                extra={"loss_scale": scaler["cur_scale"]} if scaler else {},
            )
        )
        if slow and slow.named:
            self.monitor.message(f"warning: {slow.named}")
            self.monitor.text("stragglers", slow.named)

    def _log_validation(self, step: int) -> None:
        self.monitor.log_validation(step, self.evaluate(), self.validation_facts)
        if self.job.monitor.histograms:
            parameters = {fragment.name: fragment.tensors["parameter"] for fragment in self.engine.fragments()}
            self.monitor.log_histograms(step, {name: part.float().cpu().numpy() for name, part in parameters.items()})

    def _remember(self, step: int, loss: float) -> None:
        """Keeps the last losses for the next checkpoint; the first one after a resume is held against those before."""
        if self._expected is not None:
            odd, self._expected = unlike_recent(loss, self._expected), None
            if odd:
                self.monitor.message(f"warning: {odd}")
        self._losses[str(step)] = loss
        for known in list(self._losses)[:-LAST_LOSSES]:
            del self._losses[known]

    def _save(self, progress: Progress, *, last: bool) -> None:
        """Starts a save, after the one in flight if there is one; the last is waited for, and must succeed."""
        saved = self.checkpoints.outcome(wait=False)
        if saved is None and self.checkpoints.saving:
            self.monitor.message(f"step {progress.step}: waiting for the save before, which is still being written")
            saved = self.checkpoints.outcome(wait=True)
        self._report(saved)
        self.checkpoints.save(self.engine, progress, self.training, self._losses)
        if last or not self.job.checkpoint.asynchronous:
            self._report(self.checkpoints.outcome(wait=True), required=last)

    def _report(self, saved: Saved | None, *, required: bool = False) -> None:
        """Tells how a save ended. Raises CheckpointError where a failed one has to end the job."""
        if saved is None:
            return
        if saved.complete:
            self.monitor.message(f"saved {saved.path}")
        if saved.error is not None:
            if required or self.job.checkpoint.on_save_error == "stop":
                raise saved.error
            self.monitor.message(f"warning: {saved.error}; training goes on, earlier checkpoints are untouched")


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
