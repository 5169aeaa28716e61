"""The training loop: when to step, evaluate, save and stop, and what to report."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.profiler import record_function

from launch.config import JobConfig
from launch.data.batches import Batches
from launch.data.prefetch import prefetched
from launch.feed import HostBatch
from launch.health.stragglers import Stragglers
from launch.health.time_limits import STEP, Pace
from launch.monitoring.monitor import Monitor, StepRecord
from launch.monitoring.timing import StepClock
from launch.monitoring.tracing import DATA, StepTracer
from launch.saving.checkpoint import Checkpoints
from launch.saving.checkpoint_records import Progress, Saved
from launch.saving.resume_checks import LAST_LOSSES, unlike_recent
from launch.step_outcome import StepOutcome
from launch.stepper import Stepper
from parallel.peer_memory import peer_memory_allocated


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or not a number; going on would only waste the job's time."""


class Trainer:
    """One run of one job on one rank. All ranks call `run` together."""

    def __init__(
        self,
        job: JobConfig,
        stepper: Stepper,
        training: Batches,
        validation: Batches,
        validation_facts: dict[str, float],
        monitor: Monitor,
        checkpoints: Checkpoints,
        stop: Callable[[], bool],
        pace: Pace,
        stragglers: Stragglers | None,
    ):
        """`validation_facts` are logged beside the validation loss.

        `stop()` is called once a step. True, at the same step on every rank, means: save and return early. `pace` notes
        what begins, for the watchdog. Without `stragglers` nobody looks for slow ranks.
        """
        self.job, self.stepper, self.engine, self.timer = job, stepper, stepper.engine, stepper.timer
        self.training, self.validation, self.validation_facts = training, validation, validation_facts
        self.monitor, self.checkpoints, self.stop = monitor, checkpoints, stop
        self.pace, self.stragglers = pace, stragglers
        self.tracer = StepTracer(job.profile.steps, job.run_path / "trace", dist.get_rank())
        self._losses: dict[str, float] = {}
        self._expected: dict[str, float] | None = None

    def run(self, progress: Progress, losses: Mapping[str, float] | None = None) -> Progress:
        """Trains from `progress` to the end. Evaluates and saves at the configured intervals and at the end. If told to
        stop, it saves and returns early. Returns the progress it reached.

        `losses` are the last ones before a resume: step -> loss. Raises NonFiniteLoss, and CheckpointError if the last
        save fails (an earlier one does as checkpoint.on_save_error says).
        """
        total, start = self.job.total_steps, progress.step
        self._losses = self._expected = dict(losses or {})
        evaluation, saving = self.job.training.evaluation_interval, self.job.checkpoint.save_interval
        unchecked: StepOutcome | None = None
        clock, steps = StepClock(), partial(self.training.steps, start, total)
        with prefetched(lambda step: self.stepper.cut(self.training.micro_batches(step)), steps()) as batches:
            for step in steps():
                outcome = self._step(step, batches, clock)
                clock.count()
                # Checked one step late: by then the values are there, and reading them does not hold up the device.
                if unchecked is not None:
                    self._check_finite(unchecked)
                unchecked = outcome
                progress = replace(progress, step=outcome.step, tokens=progress.tokens + self.job.tokens_per_step)
                self.monitor.advance(outcome.step)
                last = outcome.step == total
                stopping = self.stop() and not last
                if last or _due(outcome.step, self.job.monitor.log_interval):
                    self._check_finite(outcome)
                    self._log(outcome, progress, clock)
                with clock.paused():
                    if last or _due(outcome.step, evaluation):
                        self._check_finite(outcome)
                        self.pace.begin("evaluation", outcome.step)
                        self._log_validation(outcome.step)
                    if last or stopping or _due(outcome.step, saving):
                        self._check_finite(outcome)
                        self.pace.begin("checkpoint", outcome.step)
                        self.timer.mark("")
                        self._save(progress, last=last or stopping)
                        self.timer.mark("checkpoint")
                if stopping:
                    self.monitor.message(
                        f"stopped after step {outcome.step} of {total}, as asked by a signal or a watchdog"
                    )
                    break
        self.pace.begin("the end", progress.step)
        if start >= total:
            self.monitor.message(
                f"step {start} of {total}: this run is already complete; raise training.max_steps (or max_tokens) to "
                "train further, or start a new run under another job.name"
            )
        return progress

    # -- inside --------------------------------------------------------------------------------------------------------

    def _step(self, step: int, batches: Iterator[list[HostBatch]], clock: StepClock) -> StepOutcome:
        """One training step, timed, and traced if it is one of those."""
        self.pace.begin(STEP, step + 1)
        self.tracer.before(step + 1, clock)
        self.timer.start()
        with record_function(DATA):
            micro_batches = next(batches)
        self.timer.mark("data")
        outcome = self.stepper.train(step, micro_batches)
        traced = self.tracer.after(outcome.step, clock)
        if traced:
            self.monitor.message(traced)
        return outcome

    def _check_finite(self, outcome: StepOutcome) -> None:
        """Waits for the step's numbers and remembers its loss. Raises NonFiniteLoss: on all ranks at once, because all
        see the same loss and norm. May be called twice for a step."""
        self._remember(outcome.step, outcome.loss)
        if self.stepper.is_sound(outcome):
            return
        flags = torch.zeros(dist.get_world_size(), device=self.engine.device)
        flags[dist.get_rank()] = float(not math.isfinite(outcome.local_loss))
        dist.all_reduce(flags)
        ranks = [str(rank) for rank, flag in enumerate(flags.tolist()) if flag]
        where = f"on rank {', '.join(ranks)}" if ranks else "in the gradients only"
        self._report(self.checkpoints.outcome(wait=True))
        # The newest checkpoint may hold the very weights that failed; those before it led to a sound step.
        before = max(self.training.steps(0, outcome.step - 1), default=0)
        steps = self.checkpoints.steps()
        sound = [step for step in steps if step <= before]
        good = f"step-{sound[-1]:08d} in {self.checkpoints.storage.location}" if sound else "none"
        if sound and sound != steps:
            good += f" (python launch/rollback.py {self.job.run_path} --step {sound[-1]} goes back to it)"
        raise NonFiniteLoss(
            f"step {outcome.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}; it arose {where}. "
            f"Last good checkpoint: {good}. "
            "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, clip gradients at a smaller norm "
            f"(training.gradient_clipping is {self.job.training.gradient_clipping:g}; 0 clips none), or look at the "
            "data of this step, which training.skip_steps can leave out"
        )

    def _log(self, outcome: StepOutcome, progress: Progress, clock: StepClock) -> None:
        """Logs a step, and what has happened since the last one logged."""
        parts, seconds = self.timer.collect(), clock.read()
        with clock.paused():
            scaler = self.engine.loss_scaler_state
            slow = self.stragglers.look(parts.get("data", 0.0)) if self.stragglers else None
            self.monitor.log_step(
                StepRecord(
                    step=outcome.step,
                    loss=outcome.loss,
                    gradient_norm=outcome.grad_norm,
                    learning_rate=self.stepper.learning_rate(outcome.step - 1),
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
            limit = self.pace.note()
            if limit:
                self.monitor.message(limit)
            self._report(self.checkpoints.outcome(wait=False))

    def _log_validation(self, step: int) -> None:
        loss = self.stepper.evaluate(self.validation.once(self.job.training.evaluation_batches))
        self.monitor.log_validation(step, loss, self.validation_facts)
        if self.job.monitor.histograms:
            parameters = {fragment.name: fragment.tensors["parameter"].detach() for fragment in self.engine.fragments()}
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
        """Reports how a save ended. Raises CheckpointError if a failed one has to end the job."""
        if saved is None:
            return
        if saved.complete:
            self.monitor.message(f"saved {saved.path}")
        if saved.error is not None:
            if required or self.job.checkpoint.on_save_error == "stop":
                raise saved.error
            self.monitor.message(f"warning: {saved.error}; training goes on, earlier checkpoints are untouched")


def _peak_memory(device: torch.device) -> int:
    """Bytes: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + peer_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps is due after `step`; never for 0."""
    return interval > 0 and step % interval == 0
