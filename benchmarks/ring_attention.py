"""Context-parallel attention against the same kernel on one GPU, and against its peers, on the GPUs of one node.

    torchrun --nproc-per-node 2 benchmarks/ring_attention.py --output docs/ring_attention.json
        [--set bars|grid] [--rows REGEX] [--modes REGEX] [--peers] [--kernel flash_attn_4] [--shard 1/3] [--seconds 540]
    python benchmarks/ring_attention.py --output docs/ring_attention.json --merge OTHER.json ... --report

Every row is forward + backward in bf16, head_dim 128, batch 1. All contestants of a row take turns in one run; times
are medians of the slowest rank, the ideal is the same kernel on one GPU over the whole sequence divided by the number
of GPUs. Errors are relative (2-norm), the largest of out, dq, dk and dv, against fp32 for a gradient that is zero but
at 128 queries. "Exposed" is the part of a few profiled forwards + backwards in which no kernel of attention runs on the
GPU whose kernels take longest: messages, waits, copies, merges and the host. TFLOP/s count what the mask lets through,
and a backward as 2.5 forwards. Backward runs on the calling thread: the two hops to autograd's own and back cost 0.8 ms
here, which a job pays once a step and not once a layer. What `context_parallel_mode: auto` takes is always among the
contestants, and marked.

Results are entered by row, kernel and run; ratios are taken within a run. A run measures the anchor row and its shard
of the rows, begins none after --seconds, and leaves out those that the file holds already (--again measures them
anew), so that a run which was cut short goes on where it stopped. --merge adds other files' runs; --report writes the
table, the plot and docs/ring_attention.md's summaries, without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from attention_contest import results as book
from attention_contest.report import all_tables, bars_table, entry_table, grid_table, plot
from attention_contest.rows import ANCHOR, ONE_GPU, Row, all_rows, bars
from documents import renew

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
PACKAGES = ["flash-attn", "flash-attn-4", "ring-flash-attn", "yunchang", "triton"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the file of results, made or continued")
    parser.add_argument("--set", choices=["bars", "grid"], default="bars")
    parser.add_argument("--rows", default="", help="regular expression on row names")
    parser.add_argument("--modes", default="", help="regular expression on contestants' names, beside one GPU")
    parser.add_argument("--kernel", help="rows of this kernel only; of the grid, flash_attn_4 unless said otherwise")
    parser.add_argument("--peers", action="store_true", help="other libraries too")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the file holds")
    parser.add_argument("--shard", default="1/1", help="I/N: the I-th of N parts, from 1")
    parser.add_argument("--seconds", type=float, default=540, help="begin no row after these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script, over gloo")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="add the runs of these files")
    parser.add_argument("--report", action="store_true", help="write docs/ring_attention*, measure nothing")
    options = parser.parse_args()
    if options.merge:
        book.save(book.merged(book.load(path) for path in [options.output, *options.merge]), options.output)
    if options.report:
        write_report(book.load(options.output))
    if not (options.merge or options.report):
        measure(options)


def wanted_rows(options: argparse.Namespace) -> list[tuple[Row, str]]:
    """The anchor, and this shard of the chosen rows, each with its kernel."""
    if options.set == "bars":
        pairs = list(dict.fromkeys((bar.row, bar.kernel) for bar in bars()))
    else:
        pairs = [(row, options.kernel or "flash_attn_4") for row in all_rows()]
    pairs = [
        (row, kernel)
        for row, kernel in pairs
        if re.search(options.rows, row.name) and kernel == (options.kernel or kernel)
    ]
    index, count = map(int, options.shard.split("/"))
    anchor = (ANCHOR, options.kernel or "flash_attn_4")
    return [anchor, *(pair for pair in pairs[index - 1 :: count] if pair != anchor)]


def measure(options: argparse.Namespace) -> None:
    """One run. Rank 0 alone reads and writes the file."""
    from attention_contest.contestants import Stage, auto_name, our_contestants
    from attention_contest.measure import measure_row
    from attention_contest.peers import peers

    began = time.monotonic()
    device = start(options.device)
    results = book.load(options.output)
    run = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}"
    for row, kernel in wanted_rows(options):
        stage = Stage.of_world(row, kernel, device)
        ours, others = our_contestants(stage), peers(stage) if options.peers else {}
        auto = auto_name(row, stage.ranks)
        always = {ONE_GPU, auto}
        chosen = {
            name: build for name, build in (ours | others).items() if name in always or re.search(options.modes, name)
        }
        known = (row, kernel) != wanted_rows(options)[0] and book.measured(results, row, kernel, chosen)
        if not agreed((options.again or not known) and time.monotonic() - began < options.seconds):
            continue
        modes = measure_row(stage, chosen, set(ours))
        entry = {"row": asdict(row), "kernel": kernel, "gpus": stage.ranks, "auto": auto, "modes": modes}
        if dist.get_rank() == 0:
            book.add(results, run, about(device), entry)
            book.save(results, options.output)
            print(f"{row.name}, {kernel} ({time.monotonic() - began:.0f} s)\n\n{entry_table(entry)}\n", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def start(device_type: str) -> torch.device:
    """Joins the world that torchrun made."""
    if device_type == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    dist.init_process_group("nccl")
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    dist.all_reduce(torch.zeros(1, device=device))  # makes the communicator before anything is timed
    return device


def agreed(mine: bool) -> bool:
    """What rank 0 thinks: ranks' clocks differ."""
    answer = [mine]
    dist.broadcast_object_list(answer)
    return answer[0]


def about(device: torch.device) -> dict[str, Any]:
    """What a run runs on."""
    found = {"gpus": dist.get_world_size(), "torch": torch.__version__, "gpu": "CPU"}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_report(results: book.Results) -> None:
    """docs/ring_attention_table.md and .svg, and the summaries inside docs/ring_attention.md."""
    (DOCUMENTS / "ring_attention_table.md").write_text(full_table(results))
    plot(results, DOCUMENTS / "ring_attention.svg")
    renew(DOCUMENTS / "ring_attention.md", summaries(results))


def full_table(results: book.Results) -> str:
    """The whole of docs/ring_attention_table.md."""
    return (
        "# Every row that was measured\n\nWritten by `benchmarks/ring_attention.py --report` from "
        "[ring_attention.json](ring_attention.json). [ring_attention.md](ring_attention.md) explains the terms.\n\n"
        f"{all_tables(results)}"
    )


def summaries(results: book.Results) -> dict[str, str]:
    """What stands in docs/ring_attention.md, by the names of its marks."""
    return {"bars": bars_table(results), "grid": grid_table(results)}


if __name__ == "__main__":
    main()
