"""Which jobs cannot train on a machine, by the estimates of memory and time: an attempt would only take time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.config import JobConfig
from launch.memory.recompute_plan import planned_footprint
from launch.monitoring.throughput import flops_per_token, peak_flops_per_second

HOST_SHARE = 0.9
"""Of the host's memory: the rest is for the processes themselves. A host without memory ends more than an attempt."""
ASSUMED_SHARE = 0.5
"""Of the GPU's peak FLOP/s, by which the time of a step is foretold."""
CPU_FLOPS = 1e11
"""Per second, of a process without a GPU, at the most: enough to tell a trial from an attempt."""


@dataclass(frozen=True)
class Limits:
    """What an attempt may take."""

    device_memory: int
    host_memory: int
    """Of all processes together."""
    flops: float
    """Of one GPU, or of one process without, per second."""
    seconds: float
    """For the steps."""

    def hopeless(self, job: JobConfig, gpus: int, steps: int) -> str | None:
        """Why `job` cannot train here; None if it may."""
        mesh = job.mesh_shape(gpus)
        whole = planned_footprint(job, mesh, "cuda", self.device_memory)
        host = gpus * (whole.states.host + whole.activations.host)
        # The forward pass is a third of a step, and is made twice.
        flops = 4 / 3 * flops_per_token(job.model, job.training.sequence_length, causal=True) * job.tokens_per_step
        seconds = steps * flops / (gpus * self.flops)
        if whole.peak > self.device_memory:
            return f"estimate {_gib(whole.peak)} a process, of {_gib(self.device_memory)} on its device"
        if host > self.host_memory:
            return f"estimate {_gib(host)} of host memory, of {_gib(self.host_memory)}"
        if seconds > self.seconds:
            return f"about {seconds:,.0f} s a step, of {self.seconds:,.0f}"
        return None


def limits_here(seconds: float) -> Limits:
    """Those of this host and its GPUs, with `seconds` for the steps."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        host = min(host, int(text))
    host = int(HOST_SHARE * host)
    if not torch.cuda.is_available():
        return Limits(host, host, CPU_FLOPS, seconds)
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return Limits(memory, host, ASSUMED_SHARE * (peak_flops_per_second(name, "bf16") or 1e15), seconds)


def _gib(size: float) -> str:
    return f"{size / 2**30:.0f} GiB"
