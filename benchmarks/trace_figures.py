"""What the parts of a training step cost inside a real step: the inputs of `scaling_model.py`, from a rank's trace.

    python benchmarks/trace_figures.py TRACE --set KEY=VALUE ... --output docs/machine.json

TRACE is one compiled ZeRO-3 step of the 8B shape as `profile.steps` or torch's profiler writes it (Chrome format);
`--set` is its job, in the words of `train_throughput.py`. The figures contain what communication beside them costs, and
a collective's time what a rank waited for the other.

- products: the model's operations over the time of all matrix products, head included;
- attention: its kernels, forward and backward;
- elementwise bandwidth: the fused SwiGLU, which reads two rows of intermediate_size for each token and writes one;
- AdamW, and the median gathering and reduction of a block.

A trace holds one sequence length; attention at the long one is taken from docs/ring_attention.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
from pathlib import Path
from typing import Any

from attention_contest.results import load, runs_of
from attention_contest.rows import ONE_GPU, Row
from launch.config import JobConfig
from launch.memory.parameters import count_parameters
from scaling_model import DOCS
from step_time import ADAMW_BYTES, BF16, FP32, block_parameters, head_flops, product_flops
from workload import job_of

KERNELS = {
    "products": r"nvjet|gemm|cublas",
    "attention_forward": r"FlashAttentionForward",
    "attention_backward": r"FlashAttentionBackward",
    "swiglu": r"triton_\w*mul_silu_\d+$",
    "adamw": r"FusedAdam",
    "gather": r"nccl\w*AllGather",
    "reduce": r"nccl\w*ReduceScatter",
}
LONG = Row(32, 8, 32768)
"""Measured over one GPU as a whole sequence, too."""


def durations(trace: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each kernel of the kinds of KERNELS."""
    found: dict[str, list[float]] = {kind: [] for kind in KERNELS}
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            for kind, pattern in KERNELS.items():
                if re.search(pattern, event["name"]):
                    found[kind].append(event["dur"] / 1e6)
    missing = [kind for kind, times in found.items() if not times]
    if missing:
        raise ValueError(f"the trace holds no kernel of {', '.join(missing)}; trace one compiled ZeRO-3 step on GPUs")
    return found


def figures(trace: dict[str, Any], job: JobConfig) -> dict[str, Any]:
    """The figures that `step_time.py` takes; times are of one sequence. Raises ValueError for another kind of step."""
    model, training, times = job.model, job.training, durations(trace)
    ranks = trace["distributedInfo"]["world_size"]
    accumulation, length = job.accumulation_steps(ranks), training.sequence_length
    sequences = accumulation * training.micro_batch_size
    passes = sequences * model.num_hidden_layers
    if len(times["attention_forward"]) != accumulation * model.num_hidden_layers:
        raise ValueError(
            f"the trace holds {len(times['attention_forward'])} attention kernels, where the job's step has "
            f"{accumulation * model.num_hidden_layers}; trace one whole step, and pass its job with --set"
        )
    forward = product_flops(model, length)
    rate = (3 * passes * forward + sequences * head_flops(model, length)) / sum(times["products"])
    whole, block = count_parameters(model) / ranks, block_parameters(model) * (ranks - 1) / ranks
    swiglu = BF16 * 3 * model.intermediate_size * training.micro_batch_size * length
    return {
        "tokens": length,
        "products_forward": forward / rate,
        "products_backward": 2 * forward / rate,
        "attention_forward": sum(times["attention_forward"]) / passes,
        "attention_backward": sum(times["attention_backward"]) / passes,
        "kernel": "flash_attn_4",
        "head": head_flops(model, length) / rate,
        "elementwise_bytes_per_second": swiglu / statistics.median(times["swiglu"]),
        "adamw_bytes_per_second": ADAMW_BYTES * whole / sum(times["adamw"]),
        "gather_bytes_per_second": BF16 * block / _of_blocks(times["gather"]),
        "reduce_bytes_per_second": FP32 * block / _of_blocks(times["reduce"]),
        "gpus": ranks,
        "gpu": trace["deviceProperties"][0]["name"],
    }


def _of_blocks(seconds: list[float]) -> float:
    """The median without those of single norms, which take microseconds."""
    return statistics.median(time for time in seconds if time > 1e-4)


def long_attention() -> dict[str, Any]:
    """Attention of one GPU over the long sequence, as the attention benchmark measured it last."""
    _, entry = runs_of(load(DOCS / "ring_attention.json"), LONG, "flash_attn_4")[0]
    mode = entry["modes"][ONE_GPU]
    return {
        "long_tokens": LONG.local_tokens * entry["gpus"],
        "long_attention_forward": mode["forward"] / 1e3,
        "long_attention_backward": (mode["forward_backward"] - mode["forward"]) / 1e3,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="the job of the traced step")
    options = parser.parse_args()
    opened = gzip.open if options.trace.suffix == ".gz" else open
    with opened(options.trace, "rt") as file:
        found = figures(json.load(file), job_of(options.set)) | long_attention()
    options.output.write_text(json.dumps(found | {"source": f"a step with {' '.join(options.set)}"}, indent=1) + "\n")
    print(options.output.read_text(), end="")


if __name__ == "__main__":
    main()
