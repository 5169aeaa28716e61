"""What every system in `train_throughput.py` is given: the same job, the same tokens, the same first weights; and how
its steps are timed.

A row's job is one `JobConfig` in our words whoever trains it; `peers/` says it in theirs. Initial weights are drawn by
the parameter's name, so that all systems start from one model and their losses can be compared step by step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import JobConfig, load_job
from launch.data.batches import Batches, SequenceSampler
from launch.data.corpus import Corpus
from launch.monitoring.throughput import Throughput
from model.attention import attention_of_blocks
from model.gpt import GPT
from parallel.materialize import fill
from parallel.peer_memory import peer_memory_allocated
from parallel.tensor import TensorShard

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "llama3-8b-8k.yaml"
TOKENS_PER_STEP = 131_072
_SHORT_RUN = [
    "data.document_mask=false",
    "optimizer.learning_rate=3e-5",  # of the first step on: without a warmup, 3e-4 would first drive the loss to 30
    "optimizer.warmup_steps=0",
    "optimizer.schedule=constant",
]
WARM_UP = 2
"""Steps left out: compiling, then the allocator's first full step."""
STEPS_OF_DATA = 16
"""Steps before the tokens repeat."""


def job_of(settings: list[str]) -> JobConfig:
    """The 8B shape on 8,192 tokens under `settings`, TOKENS_PER_STEP whatever the sequence length."""
    settings = [*_SHORT_RUN, *settings]
    job = load_job(CONFIG, settings)
    if not any(setting.startswith("training.global_batch_size=") for setting in settings):
        sequences = TOKENS_PER_STEP // job.training.sequence_length
        job = load_job(CONFIG, [*settings, f"training.global_batch_size={sequences}"])
    return job


def device_of(local_rank: int) -> torch.device:
    """This rank's GPU, made current; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def random_batches(job: JobConfig, dp_size: int, dp_rank: int) -> Batches:
    """Zipf-distributed tokens, the same for every row of a sequence length, however many steps it takes (after
    STEPS_OF_DATA they repeat): the loss has something to fall for."""
    count = job.tokens_per_step * STEPS_OF_DATA
    tokens = np.random.default_rng(7).zipf(1.2, count) % job.model.vocab_size
    corpus = Corpus.from_documents("training", tokens.astype(np.uint32), [count], "random")
    sampler = SequenceSampler(corpus, job.training.sequence_length, job.job.seed)
    training = job.training
    return Batches(sampler, training.global_batch_size, training.micro_batch_size, dp_size, dp_rank)


class FirstWeights:
    """The weights that our model starts from, for a peer to fill its own parameters with, each by its name here."""

    def __init__(self, job: JobConfig) -> None:
        with torch.device("meta"):
            self._ours = GPT(job.model, attention_of_blocks(job.model, lambda window: lambda q, k, v, documents: q))
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._ours.named_parameters()}
        self._seed = job.job.seed

    @property
    def left(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter that has not been drawn yet."""
        return dict(self._shapes)

    def draw(self, name: str, into: Tensor, first_row: int = 0) -> None:
        """Fills `into` with the rows of a parameter from `first_row` on, as many as it has; each may be drawn once."""
        shard = TensorShard(self._shapes.pop(name), 0, first_row, len(into))
        fill(into, shard, *self._ours.initial_distribution(name), seed=self._seed, name=name)


def timed_steps(train_step: Callable[[int], tuple[float, float]], steps: int) -> dict[str, Any]:
    """Calls `train_step(0)`, ..., which returns loss and gradient norm; seconds between two idle devices."""
    seconds, losses, norms = [], [], []
    for step in range(steps):
        _wait()
        started = time.perf_counter()
        loss, norm = train_step(step)
        _wait()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
        norms.append(float(norm))
        if dist.get_rank() == 0:
            print(f"step {step + 1}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}, norm {norms[-1]:.4f}", flush=True)
    return {"all_seconds": seconds, "losses": losses, "gradient_norms": norms}


def record(job: JobConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """A row's figures, from what `timed_steps` measured: rates of the median steady step, and memory of this rank."""
    on_gpu, gib = torch.cuda.is_available(), 2**30
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    steady = statistics.median(measured["all_seconds"][WARM_UP:])
    throughput = Throughput.of_job(job, dist.get_world_size(), torch.device("cuda" if on_gpu else "cpu"))
    return {
        "layers": job.model.num_hidden_layers,
        "sequence_length": job.training.sequence_length,
        "micro_batch_size": job.training.micro_batch_size,
        "zero_stage": job.parallel.zero_stage,
        "tensor_parallel_size": job.parallel.tensor_parallel_size,
        "tokens_per_step": job.tokens_per_step,
        "gpus": dist.get_world_size(),
        "gpu": name,
        "torch": torch.__version__,
        "seconds": steady,
        **throughput.rates(steady),
        "peak_gib": (torch.cuda.max_memory_allocated() + peer_memory_allocated()) / gib if on_gpu else 0.0,
        "reserved_gib": (torch.cuda.max_memory_reserved() + peer_memory_allocated()) / gib if on_gpu else 0.0,
        **measured,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
