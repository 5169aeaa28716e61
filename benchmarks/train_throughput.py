"""Training throughput of the whole system, and of its peers, on the GPUs of one node; a process group for each row.

    python benchmarks/train_throughput.py --output docs/throughput.json [--rows REGEX] [--layers 32] [--again]
    python benchmarks/train_throughput.py --output docs/throughput.json --merge other.json ... [--document docs]

Every row trains the Llama-3-8B shape (`configs/llama3-8b-8k.yaml`) on 131,072 tokens a step in bf16 with fp32 gradient
accumulation, on the same random tokens from the same first weights (`workload.py`), and reports the median of its
steady steps, MFU, peak memory beside the check's estimate, and the loss of every step. Peers (`peers/`) take part where
their packages can be imported.

Rows start one after the other through torchrun; a row that the output holds is left out, so an interrupted run goes on
where it stopped. GPUs differ between machines by several percent, so each machine's rows are a run of their own, its
first row is the anchor, and rows are compared by their ratio to the anchor of their run. `--layers` and `--set` change
the job, for tuning; without GPUs rows run in two processes on the CPU. `--alone 2` runs rank 0 of two by itself, with
messages that cost nothing (`free_messages.py`): what fits, and what a system would reach at most. `--merge` adds other
files' rows, `--document` writes the table and the plot into that folder, and neither measures anything.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ringzero_row
from free_messages import alone
from launch.config import JobConfig
from row_process import Results, load, results_parser, save, torchrun
from throughput_report import comparison, table, write_document
from workload import device_of, job_of


@dataclass(frozen=True)
class Row:
    system: str
    """ringzero, torchtitan or huggingface."""
    settings: Sequence[str]
    """Overrides of the configuration, in our words for every system."""


def _ours(*settings: str) -> Row:
    return Row("ringzero", settings)


def _titan(*settings: str) -> Row:
    return Row("torchtitan", settings)


def _hugging_face(*settings: str) -> Row:
    return Row("huggingface", settings)


_NONE = "training.activation_checkpointing=none"
_SELECTIVE = "training.activation_checkpointing=selective"
_ATTENTION = "training.activation_checkpointing=attention"
_FULL = "training.activation_checkpointing=full"
_AUTO = ("training.activation_checkpointing=auto", "training.memory_budget_gib=128")
_TWO = "training.micro_batch_size=2"
_ZERO_2 = "parallel.zero_stage=2"
_64K = ("training.sequence_length=65536", "parallel.context_parallel_size=2")

ANCHOR = "8k, ZeRO-3, micro-batch 2"
"""The row that every run measures first."""
ROWS: dict[str, Row] = {
    ANCHOR: _ours(*_AUTO, _TWO),
    "8k, ZeRO-2, micro-batch 2": _ours(*_AUTO, _TWO, _ZERO_2),
    "8k, ZeRO-3, selective, micro-batch 2": _ours(_SELECTIVE, _TWO),
    "8k, ZeRO-3, selective": _ours(_SELECTIVE),
    "8k, ZeRO-3, no recomputation": _ours(_NONE),
    "8k, ZeRO-3, not compiled": _ours(_NONE, "training.compile=false"),
    "8k, ZeRO-2, no recomputation": _ours(_NONE, _ZERO_2),
    "8k, TP 2, micro-batch 2": _ours(*_AUTO, _TWO, "parallel.tensor_parallel_size=2"),
    "64k, CP 2, ZeRO-3": _ours(*_AUTO, *_64K),
    "64k, CP 2, ZeRO-3, attention": _ours(_ATTENTION, *_64K),
    "torchtitan 8k, selective": _titan(_SELECTIVE),
    "torchtitan 8k, no recomputation": _titan(_NONE),
    "torchtitan 8k, selective, micro-batch 2": _titan(_SELECTIVE, _TWO),
    "torchtitan 8k, selective, not resharded": _titan(_SELECTIVE, _ZERO_2),
    "torchtitan 8k, no recomputation, not resharded": _titan(_NONE, _ZERO_2),
    "torchtitan 64k, CP 2, full": _titan(_FULL, *_64K),
    "torchtitan 64k, CP 2, selective": _titan(_SELECTIVE, *_64K),
    "Hugging Face 8k, full": _hugging_face(_FULL),
    "Hugging Face 8k, full, micro-batch 2": _hugging_face(_FULL, _TWO),
    "Hugging Face 8k, full, flash-attn 2": _hugging_face(_FULL, "model.attention_backend=flash_attn_2"),
    "Hugging Face 8k, no recomputation": _hugging_face(_NONE),
}
_EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""torchtitan's own start script sets this, and so does ours (`launch.environment`)."""


def measure(row: Row, job: JobConfig, steps: int) -> dict[str, Any]:
    """One row, on every rank of its world."""
    device = device_of(int(os.environ["LOCAL_RANK"]))
    if row.system == "torchtitan":
        return importlib.import_module("peers.torchtitan_row").measure(job, steps)
    if row.system == "huggingface":
        return importlib.import_module("peers.huggingface_row").measure(job, steps, device)
    return ringzero_row.measure(job, steps, device)


def main() -> None:
    """Command line: the driver, or (with --row) one row's rank."""
    parser = results_parser(__doc__, "row", timeout=300, document="FOLDER")
    parser.add_argument("--rows", default="", help="regular expression on row names")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="the first two are left out")
    parser.add_argument("--alone", type=int, default=0, metavar="RANKS", help="one rank of so many, on one GPU")
    parser.add_argument("--no-anchor", action="store_true", help="do not measure the anchor first")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="FILE")
    options = parser.parse_args()
    if options.row:
        _measure_row(options)
        return
    if options.merge:
        save({key: row for path in [options.output, *options.merge] for key, row in load(path).items()}, options.output)
    elif not (options.document or options.table):
        _drive(options, load(options.output))
    results = load(options.output)
    if options.document:
        write_document(results, options.document)
    print(table(results), comparison(results), sep="\n\n")


def _measure_row(options: argparse.Namespace) -> None:
    """This process is one rank of a row; rank 0 writes what was found."""
    row = ROWS[options.row]
    job = job_of([f"model.num_hidden_layers={options.layers}", *options.set, *row.settings])
    with alone(options.alone) if options.alone else _world():
        started = time.perf_counter()
        found = measure(row, job, options.steps)
        found["row_seconds"] = time.perf_counter() - started
        if torch.distributed.get_rank() == 0:
            _add(options, options.row, found)


@contextmanager
def _world() -> Iterator[None]:
    """The processes that torchrun has started, whose group the row makes."""
    yield
    torch.distributed.destroy_process_group()


def _drive(options: argparse.Namespace, results: Results) -> None:
    """Measures the rows that are asked for and not held yet, the run's anchor first."""
    alike = [row for row in results.values() if row.get("alone", 0) == options.alone]
    held = {row["row"] for row in alike if row["layers"] == options.layers}
    wanted = [row for row in ROWS if re.search(options.rows, row) and (options.again or row not in held)]
    anchored = options.no_anchor or _key(options, ANCHOR) in results
    if wanted and not anchored:
        wanted = [ANCHOR, *(row for row in wanted if row != ANCHOR)]
    for row in wanted:
        _start(row, options)


def _start(row: str, options: argparse.Namespace) -> None:
    """Starts one row; notes a failure in its place."""
    arguments = ["--row", row, "--output", str(options.output), "--layers", str(options.layers)]
    arguments += ["--steps", str(options.steps), "--alone", str(options.alone)]
    arguments += ["--set", *options.set] if options.set else []
    print(f"-- {row}, {options.layers} layers", flush=True)
    log, environment = options.output.with_suffix(".log"), _EXPANDABLE if ROWS[row].system != "huggingface" else None
    processes = 1 if options.alone else torch.cuda.device_count() or 2
    reason = torchrun(__file__, arguments, processes, log, options.timeout, environment)
    if reason:
        kept = log.with_suffix(f".{re.sub('[^a-z0-9]+', '-', row.lower())}.log")
        log.rename(kept)
        print(f"{reason}; see {kept}", flush=True)
        _add(options, row, {"layers": options.layers, "failed": reason})


def _add(options: argparse.Namespace, row: str, found: dict[str, Any]) -> None:
    """Writes a row into the output file."""
    about = {"row": row, "run": _run_id(options), "alone": options.alone, "system": ROWS[row].system}
    about["settings"] = [*options.set, *ROWS[row].settings]
    about["measured"] = datetime.now(UTC).isoformat(timespec="seconds")
    save(load(options.output) | {_key(options, row): about | found}, options.output)


def _key(options: argparse.Namespace, row: str) -> str:
    return f"{_run_id(options)} / {row} / {options.layers}"


def _run_id(options: argparse.Namespace) -> str:
    """One start of one machine: its GPUs and their clocks do not change within it. Ranks alone are compared with each
    other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8] + (", alone" if options.alone else "")


if __name__ == "__main__":
    main()
