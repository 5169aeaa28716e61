"""The longest sequence that trains, by number of GPUs and set of features, with its step time.

    python benchmarks/longest_context.py --output docs/longest_context.json [--gpus 2] [--features REGEX]
        [--length 524288] [--layers 32] [--steps 1] [--timeout 590] [--document docs/longest_context.md]

Trains the Llama-3-8B shape in bf16 on one sequence a step, which context parallelism spreads over the GPUs. For each
set of features lengths are halved, from the longest that is not hopeless, until one trains: hopeless is one whose
estimate (`--check`'s) exceeds the memory of the GPU or of the host, or whose step would take longer than there is time.
Every attempt runs in fresh processes with a time limit and is written to the output, whether it trained or not;
attempts that it holds are not made again, so an interrupted search goes on where it stopped. `--length` tries that one
only, whatever the estimate says. Without GPUs there is nothing to search, and only a `--length` and a model (`--set`)
so small that CPUs can train them are tried, as a trial of this script. `--table` prints what the file holds,
`--document` writes it into a page; neither measures anything.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import ringzero_row
from attempt_limits import limits_here
from documents import markdown, renew
from launch.config import JobConfig
from launch.memory.recompute_plan import planned_footprint
from launch.monitoring.throughput import Throughput
from parallel.peer_memory import peer_memory_allocated
from row_process import Results, load, results_parser, save, torchrun
from workload import device_of, job_of, random_batches, timed_steps

LENGTHS = [2**exponent for exponent in range(20, 12, -1)]
"""From 1,048,576 tokens down to 8,192."""
BUILD_SECONDS = 120
"""Of an attempt's time, for its processes to start and its model to be built."""
MARK = "longest_context.py"

_FULL = ("training.activation_checkpointing=full",)
_TILES = ("training.mlp_tile_tokens=8192", "parallel.context_parallel_mode=exchange")
_ACTIVATIONS = ("training.offload_activations=cpu",)
_OPTIMIZER = ("parallel.offload_optimizer=cpu",)
FEATURES: dict[str, tuple[str, ...]] = {
    "full recomputation": _FULL,
    "and feed-forward layers in tiles, keys exchanged": _FULL + _TILES,
    "and activations in host memory": _FULL + _TILES + _ACTIVATIONS,
    "and attention's outputs too, not recomputed": ("training.activation_checkpointing=attention",)
    + _TILES
    + _ACTIVATIONS,
    "full recomputation, tiles, optimizer in host memory": _FULL + _TILES + _OPTIMIZER,
    "all of these in host memory": _FULL + _TILES + _ACTIVATIONS + _OPTIMIZER,
}
"""Name: overrides of the configuration."""


def search(
    lengths: Iterable[int], hopeless: Callable[[int], str | None], attempt: Callable[[int], dict[str, Any]]
) -> int | None:
    """The first of `lengths` (the longest first) that trains; `attempt` is not called where it is hopeless."""
    for length in lengths:
        why = hopeless(length)
        if why:
            print(f"   {length:,} tokens: {why}", flush=True)
        elif "failed" not in attempt(length):
            return length
    return None


def job_for(feature: str, length: int, gpus: int, options: argparse.Namespace) -> JobConfig:
    """One sequence of `length` tokens a step, over all GPUs."""
    sizes = [f"parallel.context_parallel_size={gpus}", f"training.sequence_length={length}"]
    settings = [setting for setting in FEATURES[feature] if gpus > 1 or "context_parallel" not in setting]
    layers = f"model.num_hidden_layers={options.layers}"
    return job_of([layers, *sizes, "training.global_batch_size=1", *settings, *options.set])


def measure(job: JobConfig, steps: int) -> dict[str, Any]:
    """One attempt, on every rank of its world: the last step's time, and memory of the rank that takes most."""
    device = device_of(int(os.environ["LOCAL_RANK"]))
    train_step, note = ringzero_row.prepared(job, steps, device, partial(random_batches, job))
    measured, on_gpu = timed_steps(train_step, steps), device.type == "cuda"
    free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
    memory = [
        torch.cuda.max_memory_allocated() + peer_memory_allocated() if on_gpu else 0,
        total - free,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    ]
    most = torch.tensor(memory, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    throughput = Throughput.of_job(job, dist.get_world_size(), device)
    seconds = measured["all_seconds"][-1]
    names = ("peak_gib", "device_gib", "host_gib")
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "attention": note,
        "seconds": seconds,
        **throughput.rates(seconds),
        **{name: size / 2**30 for name, size in zip(names, most.tolist(), strict=True)},
        **measured,
    }


def table(results: Results) -> str:
    """Markdown: for each number of GPUs and set of features the longest length that trained, and what the next did;
    then the sets that were not tried."""
    if not results:
        return "Not measured yet."
    columns = ["GPUs", "features", "layers", "tokens", "s a step", "tokens/s/GPU", "MFU, causal", "peak GiB"]
    columns += ["estimate GiB", "on the host, all ranks, GiB", "twice as long"]
    lines = []
    groups = dict.fromkeys((row["gpus"], row["features"], row["layers"]) for row in results.values())
    for gpus, features, layers in groups:
        rows = {
            row["tokens"]: row
            for row in results.values()
            if (row["gpus"], row["features"], row["layers"]) == (gpus, features, layers)
        }
        trained = [length for length, row in rows.items() if "failed" not in row]
        cells = [str(gpus), features, str(layers)]
        if trained:
            row = rows[max(trained)]
            cells += [f"{max(trained):,}", f"{row['seconds']:.1f}", f"{row['tokens_per_second_per_device']:,.0f}"]
            cells += [f"{row['mfu_causal']:.1%}" if "mfu_causal" in row else "", f"{row['peak_gib']:.1f}"]
            cells += [f"{row['estimated_gib']:.1f}", f"{row['estimated_host_gib']:.0f}"]
        else:
            cells += ["none"] + [""] * 6
        beyond = rows.get(2 * max(trained) if trained else min(rows), {})
        lines.append([*cells, beyond.get("failed", "").replace("|", " ")])
    missing = [f'"{feature}"' for feature in FEATURES if all(row["features"] != feature for row in results.values())]
    remark = textwrap.fill(f"Not measured yet: {', '.join(missing)}.", 120)
    return markdown(columns, lines) + (f"\n\n{remark}" if missing else "")


def main() -> None:
    """Command line: the search, or (with --attempt) one attempt's rank."""
    parser = results_parser(__doc__, "attempt", timeout=590, document="PAGE")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2, help="default: all, on CPUs 2")
    parser.add_argument("--features", default="", help="regular expression on the names of features")
    parser.add_argument("--length", type=int, help="this length only")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1, help="the last one is timed")
    options = parser.parse_args()
    if options.attempt:
        found = measure(job_for(options.attempt, options.length, options.gpus, options), options.steps)
        if dist.get_rank() == 0:
            _add(options, options.attempt, options.length, found)
        dist.destroy_process_group()
        return
    if not options.table and not options.document:
        features = [feature for feature in FEATURES if re.search(options.features, feature)]
        if not torch.cuda.is_available() and (refusal := _beyond_cpus(features, options)):
            parser.error(f"there are no GPUs here; {refusal}")
        for feature in features:
            _search(feature, options)
    text = table(load(options.output))
    if options.document:
        renew(options.document, {MARK: text})
    print(text)


def _beyond_cpus(features: Iterable[str], options: argparse.Namespace) -> str | None:
    """What CPUs cannot do of it, and what they can; None for a small trial."""
    remedy = "run this where there are some, or try the script with a short --length and a small model (--set)"
    if options.length is None:
        return f"{remedy}; --table and --document need none"
    limits = limits_here(options.timeout - BUILD_SECONDS)
    for feature in features:
        why = limits.hopeless(job_for(feature, options.length, options.gpus, options), options.gpus, options.steps)
        if why:
            return f"{options.length:,} tokens, {feature}: {why}; {remedy}"
    return None


def _search(feature: str, options: argparse.Namespace) -> None:
    print(f"-- {feature}: {options.gpus} GPUs, {options.layers} layers", flush=True)
    limits = limits_here(options.timeout - BUILD_SECONDS)

    def hopeless(length: int) -> str | None:
        why = None
        if options.length is None and torch.cuda.is_available():
            why = limits.hopeless(job_for(feature, length, options.gpus, options), options.gpus, options.steps)
        if why:
            _add(options, feature, length, {"failed": f"not tried: {why}"})
        return why

    search([options.length] if options.length else LENGTHS, hopeless, lambda length: _attempt(feature, length, options))


def _attempt(feature: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """What an attempt gave, now or when it was made."""
    held = load(options.output).get(_key(options, feature, length), {})
    if held and not options.again and not held.get("failed", "").startswith("not tried"):
        return held
    print(f"   {length:,} tokens", flush=True)
    arguments = ["--attempt", feature, "--output", str(options.output), "--gpus", str(options.gpus)]
    arguments += ["--length", str(length), "--layers", str(options.layers), "--steps", str(options.steps)]
    arguments += ["--set", *options.set] if options.set else []
    log = options.output.with_suffix(f".{options.gpus}-{re.sub('[^a-z0-9]+', '-', feature.lower())}-{length}.log")
    # Long sequences leave little memory over: none of it to gaps between the allocator's blocks.
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    reason = torchrun(__file__, arguments, options.gpus, log, options.timeout, environment)
    if reason:
        print(f"   {reason}; see {log}", flush=True)
        _add(options, feature, length, {"failed": reason})
    return load(options.output)[_key(options, feature, length)]


def _add(options: argparse.Namespace, feature: str, length: int, found: dict[str, Any]) -> None:
    """Writes an attempt into the output, with what was estimated for it."""
    job = job_for(feature, length, options.gpus, options)
    mesh = job.mesh_shape(options.gpus)
    whole = planned_footprint(job, mesh, "cuda")
    about = {"gpus": options.gpus, "features": feature, "layers": options.layers, "tokens": length}
    about |= {"settings": [*FEATURES[feature], *options.set], "estimated_gib": whole.peak / 2**30}
    about |= {"estimated_host_gib": options.gpus * (whole.states.host + whole.activations.host) / 2**30}
    save(load(options.output) | {_key(options, feature, length): about | found}, options.output)


def _key(options: argparse.Namespace, feature: str, length: int) -> str:
    return f"{options.gpus} / {feature} / {options.layers} / {length}"


if __name__ == "__main__":
    main()
