"""Rank 0 of each shipped job by itself, on one GPU, with messages that arrive at once (`free_messages.py`): its peak
memory beside the check's estimate, and what the rate of a GPU would be if messages cost nothing.

    python benchmarks/shipped_alone.py --output docs/shipped_alone.json [--jobs REGEX]
    python benchmarks/shipped_jobs.py --write    # the table that shows them

Two micro-batches a step, on random tokens. Recomputation is what fits GPUs of 80 GB. Left out: the job of 524,288
tokens, which takes too long, and the one that starts from weights, as another has its shape and layout.
"""

from __future__ import annotations

import argparse
import re

import ringzero_row
from free_messages import alone
from launch.config import JobConfig
from launch.memory.recompute_plan import ASSUMED_MEMORY, BUDGET_SHARE
from row_process import load, results_parser, save, torchrun
from shipped_jobs import SIZES, shipped
from workload import device_of

MICRO_BATCHES, STEPS = 2, 6
LEFT_OUT = ("llama3-8b-512k", "llama3-8b-finetune")
JOBS = {f"{name} on {gpus}": (name, gpus) for name in SIZES if name not in LEFT_OUT for gpus in SIZES[name]}


def short(name: str, gpus: int, settings: list[str]) -> JobConfig:
    """The job as it is laid out for GPUs of 80 GB, with `MICRO_BATCHES` a step."""
    job = shipped(name, gpus)
    sequences = MICRO_BATCHES * job.training.micro_batch_size * job.mesh_shape(gpus).data_parallel_size
    return shipped(
        name,
        gpus,
        f"training.global_batch_size={sequences}",
        f"training.memory_budget_gib={BUDGET_SHARE * ASSUMED_MEMORY / 2**30}",
        "optimizer.warmup_steps=0",
        *settings,
    )


def main() -> None:
    """Command line: the driver, or (with --job) one job's rank."""
    parser = results_parser(__doc__, "job", timeout=150)
    parser.add_argument("--jobs", default="", help="regular expression on their names and numbers of GPUs")
    options = parser.parse_args()
    if options.job:
        _measure(options)
        return
    for job in JOBS:
        if re.search(options.jobs, job) and (options.again or job not in load(options.output)):
            print(f"-- {job}", flush=True)
            arguments = ["--job", job, "--output", str(options.output)]
            arguments += ["--set", *options.set] if options.set else []
            log = options.output.with_suffix(f".{re.sub('[^a-z0-9]+', '-', job)}.log")
            expandable = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as `launch.environment` sets it
            if reason := torchrun(__file__, arguments, 1, log, options.timeout, expandable):
                print(f"{reason}; see {log}", flush=True)
                _add(options, job, {"failed": reason})


def _measure(options: argparse.Namespace) -> None:
    name, gpus = JOBS[options.job]
    with alone(gpus):
        job = short(name, gpus, options.set)
        _add(options, options.job, ringzero_row.measure(job, STEPS, device_of(0)))


def _add(options: argparse.Namespace, job: str, found: dict[str, object]) -> None:
    save(load(options.output) | {job: found}, options.output)


if __name__ == "__main__":
    main()
