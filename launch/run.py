"""One run, from a checked configuration to the last line: what train.py does on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

import torch
import torch.distributed as dist

from launch.agreement import raised_on_all_ranks
from launch.build import build_engine, device_memory
from launch.check import layout_report
from launch.config import JobConfig
from launch.data.bigram import conditional_bigram_entropy
from launch.data.corpora import corpora_on_all_ranks, describe, training_batches, validation_batches
from launch.data.corpus import Corpus, CorpusError
from launch.data.cursor import DataCursor
from launch.data.data_log import DataLog
from launch.data.inspection import other_tokenizers
from launch.environment import Place, report_failure
from launch.exit_status import STOPPED
from launch.health.rank_health import Health
from launch.inference.cache_room import CacheTooLarge, free_memory
from launch.inference.sample import check_sample_fits, sample_prompt, write_sample
from launch.monitoring.monitor import Monitor
from launch.monitoring.run_monitor import RunMonitor
from launch.monitoring.throughput import Throughput
from launch.rendezvous import NobodyMet, join_world
from launch.resuming import beginning, checkpoints_of, cursor_of, resume
from launch.run_lock import RunDirectoryError, lock_run, writing_into
from launch.saving.checkpoint_names import CheckpointError
from launch.saving.checkpoint_records import Progress
from launch.stepper import Stepper
from launch.stopping import StopVote
from launch.trainer import NonFiniteLoss, Trainer
from launch.weights.initial_weights import load_initial_weights
from launch.weights.stored_model import RUN_FILE, WeightsError
from model.kernels import KernelUnavailable
from parallel.mesh import ParallelMesh

_TOLD = (
    CacheTooLarge,
    CheckpointError,
    CorpusError,
    KernelUnavailable,
    NonFiniteLoss,
    RunDirectoryError,
    WeightsError,
)
"""Errors that a user can fix; reported as one sentence, without a traceback."""
_ENTROPY_TOKENS = 1 << 24
"""Validation tokens that the bigram entropy is counted on, at most."""


def run(job: JobConfig, place: Place, device: torch.device, device_note: str, stop: Callable[[], bool]) -> int:
    """Trains `job` on this rank; returns the exit status. `stop()` says whether this rank was asked to stop early."""
    try:
        join_world(device.type, place, stop)
        job = _resolved(job)
        lock = _lock(job, place)
        health = Health.of(job, place)
        vote = StopVote(lambda: stop() or health.watchdog.wants_stop())
        complete = _train(job, place, device, device_note, health, vote)
    except NobodyMet as error:  # each rank waited alone: rank 0 may know of nothing
        report_failure(f"error: {error}", place, leads=not place.local_rank)
        return 1
    except _UnreadableStep as error:
        report_failure(f"error: {error}", place, leads=error.leads)
        return 1
    except _TOLD as error:
        report_failure(f"error: {error}", place)
        return 1
    except RuntimeError as error:
        if not _of_compiler(error):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        report_failure(f"error: torch.compile failed: {reason}; mend that, or set training.compile: false", place)
        if place.local_rank:
            raise  # only this rank knows, or it would have ended with its node
        return 1
    dist.barrier()
    health.watchdog.close()
    if lock is not None:
        lock.close()
    dist.destroy_process_group()
    return 0 if complete else STOPPED


def _of_compiler(error: RuntimeError) -> bool:
    """Whether what torch.compile calls cannot build code. By name: to import the class takes two seconds."""
    return any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__)


def _resolved(job: JobConfig) -> JobConfig:
    """Rank 0's configuration, on every rank."""
    box = [job.to_yaml()]
    dist.broadcast_object_list(box, src=0)
    return JobConfig.from_yaml(box[0])


def _lock(job: JobConfig, place: Place) -> BinaryIO | None:
    """The run directory's lock, held by rank 0. Raises RunDirectoryError on every rank."""
    with raised_on_all_ranks(RunDirectoryError):
        return lock_run(job.run_path) if place.rank == 0 else None


def _train(
    job: JobConfig, place: Place, device: torch.device, device_note: str, health: Health, stop: StopVote
) -> bool:
    """Trains; returns whether the run is complete, which it is not if it was stopped."""
    if job.training.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(job.job.seed)
    mesh = ParallelMesh.create(job.mesh_shape(place.world_size))
    probed = health.probe(device)
    if probed is None:
        return False
    corpora = corpora_on_all_ranks(job)
    prompt = sample_prompt(job, corpora.validation)  # at the end its faults would cost a run
    engine, attention_note = build_engine(job, mesh, device)
    check_sample_fits(job, prompt, mesh, device.type, free_memory(device, place.local_size))
    checkpoints = checkpoints_of(job)
    resumed = resume(job, checkpoints, engine)
    progress = resumed.progress if resumed else None
    resumed_from = progress.step if progress else None
    cursor = cursor_of(job, corpora, progress)
    batches = training_batches(corpora, job, cursor, mesh.dp_size, mesh.dp_rank)
    if resumed is not None and not cursor.changes_at(resumed.progress.step):
        checkpoints.check_batches(resumed, batches)
    initial = load_initial_weights(job, engine) if resumed is None and job.model.init_from else None
    monitor = _monitor(job, place, device, resumed_from)
    facts = [
        device_note,
        f"{job.mesh_shape(place.world_size)}, ZeRO-{job.parallel.zero_stage}; {job.num_parameters:,} parameters",
        f"precision {job.resolve_precision(device.type)}; {attention_note}",
        f"run directory {job.run_path}",
        *probed,
        *beginning(resumed, initial),
        *describe(corpora, job, cursor, resumed_from or 0),
    ]
    _announce(monitor, job, place, device, facts, probed)
    data_log = _data_log(job, mesh, cursor, resumed_from, monitor)
    trainer = Trainer(
        job,
        Stepper(job, mesh, engine),
        replace(batches, note=data_log.note if data_log else None),
        validation_batches(corpora, job, mesh.dp_size, mesh.dp_rank),
        _validation_facts(corpora.validation),
        monitor,
        checkpoints,
        stop,
        health.pace,
        health.stragglers(device),
    )
    try:
        reached = trainer.run(
            replace(progress or Progress(), data=cursor.record()), resumed.losses if resumed else None
        )
        complete = reached.step >= job.total_steps
        if complete and prompt:
            monitor.message(write_sample(job, prompt, mesh, engine))
    except CorpusError as error:
        raise _UnreadableStep(str(error), leads=not mesh.tp_rank and not mesh.cp_rank) from error
    finally:
        if data_log is not None:
            data_log.close()
        monitor.close()
    return complete


def _announce(
    monitor: Monitor, job: JobConfig, place: Place, device: torch.device, facts: list[str], probed: list[str]
) -> None:
    """Says what is about to train, and leaves it in TensorBoard. Collective."""
    warnings = [*job.idle_keys(place.world_size), *([] if place.rank else other_tokenizers(job))]
    for line in (*(f"warning: {line}" for line in warnings), *facts):
        monitor.message(line)
    monitor.text("probe", "\n".join(probed))
    monitor.text("configuration", job.to_yaml())
    monitor.text("layout", layout_report(job, place.world_size, device.type, device_memory(device)))


def _validation_facts(validation: Corpus) -> dict[str, float]:
    return {"bigram_entropy": conditional_bigram_entropy(validation.read(0, min(len(validation), _ENTROPY_TOKENS)))}


class _UnreadableStep(CorpusError):
    """Data that cannot be read while training: only the ranks of one replica know."""

    def __init__(self, message: str, *, leads: bool):
        """`leads`: this rank reports for its replica."""
        super().__init__(message)
        self.leads = leads


def _data_log(
    job: JobConfig, mesh: ParallelMesh, cursor: DataCursor, resumed_from: int | None, monitor: Monitor
) -> DataLog | None:
    """The record of what this replica reads, on its first rank."""
    if mesh.tp_rank or mesh.cp_rank:
        return None
    log = DataLog(job.run_path / "data", mesh.dp_rank, mesh.dp_size, resumed_from, monitor.message)
    if mesh.dp_rank == 0:
        log.write_cursor(cursor.record(), {corpus.label: corpus.path for corpus in job.data.blend})
    return log


def _monitor(job: JobConfig, place: Place, device: torch.device, resumed_from: int | None) -> Monitor:
    if place.rank:
        return Monitor()
    with writing_into(job.run_path):
        (job.run_path / RUN_FILE).write_text(job.to_yaml())
    return RunMonitor(
        job.run_path,
        throughput=Throughput.of_job(job, place.world_size, device),
        total_steps=job.total_steps,
        resumed_from=resumed_from,
        progress_bar=job.monitor.progress_bar,
        tensorboard=job.monitor.tensorboard,
    )
