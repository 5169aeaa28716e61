"""Training throughput of the whole system on the GPUs of one node, a process group for each row.

    python benchmarks/train_throughput.py --output docs/train_throughput.json [--rows REGEX] [--layers 32] [--again]

Every row trains the Llama-3-8B shape (`configs/llama3-8b-8k.yaml`) on 131,072 tokens a step in bf16 with fp32 gradient
accumulation, on the same random tokens, and reports the median of its steady steps, MFU, peak memory beside the check's
estimate, and the loss of every step. Rows start one after the other through torchrun; a row that the output holds is
left out, so an interrupted run goes on where it stopped. `--layers` trains a shallower model, for tuning. `--table`
prints the file's contents as Markdown and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.build import build_engine
from launch.check import peak_memory
from launch.config import JobConfig, load_job
from launch.corpus import Corpus
from launch.data import Batches, SequenceSampler
from launch.feed import cut
from launch.monitor import SilentMonitor
from launch.throughput import Throughput
from launch.trainer import Trainer
from parallel.mesh import ParallelMesh
from parallel.zero import initialize_distributed

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "llama3-8b-8k.yaml"
TOKENS_PER_STEP = 131_072
ROWS: dict[str, list[str]] = {
    "8k, ZeRO-3, no recomputation": ["training.activation_checkpointing=none"],
    "8k, ZeRO-3, selective": ["training.activation_checkpointing=selective"],
    "8k, ZeRO-3, selective, micro-batch 2": [
        "training.activation_checkpointing=selective",
        "training.micro_batch_size=2",
    ],
    "8k, ZeRO-3, not compiled": ["training.activation_checkpointing=none", "training.compile=false"],
    "8k, ZeRO-2, no recomputation": ["training.activation_checkpointing=none", "parallel.zero_stage=2"],
    "8k, ZeRO-2, selective": ["training.activation_checkpointing=selective", "parallel.zero_stage=2"],
    "8k, TP 2, ZeRO-3": ["training.activation_checkpointing=selective", "parallel.tensor_parallel_size=2"],
    "64k, CP 2, ZeRO-3, attention": [
        "training.activation_checkpointing=attention",
        "training.sequence_length=65536",
        "parallel.context_parallel_size=2",
    ],
    "64k, CP 2, ZeRO-3, selective": [
        "training.activation_checkpointing=selective",
        "training.sequence_length=65536",
        "parallel.context_parallel_size=2",
    ],
}
"""Name: overrides of the configuration."""


def job_of(row: str, layers: int) -> JobConfig:
    """The job of a row: TOKENS_PER_STEP whatever the sequence length."""
    settings = [f"model.num_hidden_layers={layers}", "data.document_mask=false", *ROWS[row]]
    length = next((int(s.partition("=")[2]) for s in settings if s.startswith("training.sequence_length=")), 8192)
    settings += [f"training.global_batch_size={TOKENS_PER_STEP // length}", "optimizer.warmup_steps=0"]
    return load_job(CONFIG, settings)


def random_corpus(job: JobConfig, steps: int) -> Corpus:
    """Zipf-distributed tokens, the same for every row of a sequence length: the loss has something to fall for."""
    count = TOKENS_PER_STEP * (steps + 1)
    tokens = np.random.default_rng(7).zipf(1.2, count) % job.model.vocab_size
    return Corpus.from_documents("training", tokens.astype(np.uint32), [count], "random")


def measure(row: str, layers: int, steps: int) -> dict[str, Any]:
    """One row, on every rank of its world."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    initialize_distributed("cuda")
    job = job_of(row, layers)
    started = time.perf_counter()
    mesh = ParallelMesh.create(job.mesh_shape(world_size))
    engine, note = build_engine(job, mesh, device)
    built = time.perf_counter() - started
    sampler = SequenceSampler(random_corpus(job, steps), job.training.sequence_length, job.job.seed)
    training = job.training
    batches = Batches(
        sampler, training.global_batch_size, training.micro_batch_size, mesh.dp_size, mesh.dp_rank, document_mask=False
    )
    trainer = Trainer(job, mesh, engine, batches, lambda: iter(()), SilentMonitor(), None, {})  # type: ignore[arg-type]
    seconds, losses, norms = [], [], []
    for step in range(steps):
        micro_batches = [cut(batch, mesh, pin=True) for batch in batches.micro_batches(step)]
        torch.cuda.synchronize()
        started = time.perf_counter()
        outcome = trainer.train_step(step, micro_batches)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(outcome.loss))
        norms.append(float(outcome.grad_norm))
        if rank == 0:
            print(f"step {step + 1}: {seconds[-1]:.3f} s, loss {losses[-1]:.4f}, norm {norms[-1]:.4f}", flush=True)
    steady = statistics.median(seconds[2:])
    throughput = Throughput.of_job(
        job.model,
        sequence_length=training.sequence_length,
        global_batch_size=training.global_batch_size,
        devices=world_size,
        device_name=torch.cuda.get_device_name(),
        precision="bf16",
    )
    return {
        "row": row,
        "layers": layers,
        "gpus": world_size,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "attention": note,
        "seconds": steady,
        **throughput.rates(steady),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "estimated_gib": peak_memory(job, job.mesh_shape(world_size), "cuda") / 2**30,
        "build_seconds": built,
        "first_step_seconds": seconds[0],
        "losses": losses,
        "gradient_norms": norms,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| row | layers | tokens/s/GPU | MFU, causal | MFU, full | peak GiB | estimate | first and last loss |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in results.values():
        if "failed" in row:
            lines.append(f"| {row['row']} | {row['layers']} | {row['failed']} | | | | | |")
            continue
        figures = [f"{row['tokens_per_second_per_device']:,.0f}", f"{row['mfu_causal']:.1%}", f"{row['mfu_full']:.1%}"]
        figures += [f"{row['peak_gib']:.1f}", f"{row['estimated_gib']:.1f}"]
        figures.append(f"{row['losses'][0]:.4f}, {row['losses'][-1]:.4f}")
        lines.append(f"| {row['row']} | {row['layers']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line: the driver, or (with --row) one row's rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", default="", help="regular expression on row names")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7, help="the first two are left out")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the output file holds")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.row:
        found = measure(options.row, options.layers, options.steps)
        if int(os.environ["RANK"]) == 0:
            options.output.write_text(json.dumps(results | {f"{options.row} / {options.layers}": found}, indent=1))
        torch.distributed.destroy_process_group()
    elif options.table:
        print(table(results))
    else:
        for row in ROWS:
            key = f"{row} / {options.layers}"
            if re.search(options.rows, row) and (options.again or key not in results):
                _run(row, key, options)
        print(table(json.loads(options.output.read_text())))


def _run(row: str, key: str, options: argparse.Namespace) -> None:
    """Starts one row; notes a failure in its place."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(torch.cuda.device_count())]
    command += [__file__, "--row", row, "--output", str(options.output), "--layers", str(options.layers)]
    print(f"-- {key}", flush=True)
    finished = subprocess.run(
        [*command, "--steps", str(options.steps)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print("\n".join(line for line in finished.stdout.splitlines() if line.startswith("step ")), flush=True)
    options.output.with_suffix(".log").write_text(finished.stdout)
    if finished.returncode:
        errors = [line for line in finished.stdout.splitlines() if "Error" in line]
        reason = errors[0].strip()[:300] if errors else f"exit status {finished.returncode}"
        print(f"{reason}; see {options.output.with_suffix('.log')}", flush=True)
        results = json.loads(options.output.read_text()) if options.output.exists() else {}
        results[key] = {"row": row, "layers": options.layers, "failed": reason}
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
