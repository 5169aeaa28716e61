"""The step-time model (`step_time.py`) checked where steps were measured, and carried to 64 GPUs: docs/scaling.md.

    python benchmarks/scaling_model.py            # print the tables
    python benchmarks/scaling_model.py --write    # renew them in the document

Parts: docs/machine.json (`trace_figures.py`); how context parallelism shares attention: docs/ring_attention.json.
Measured steps: docs/throughput.json. Nothing is fitted to them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from attention_contest.results import finished, load, runs_of, share_of_ideal
from attention_contest.rows import ONE_GPU, Row
from documents import markdown, print_or_renew
from launch.config import load_job
from step_time import Machine, Step, head_flops, measured_policies, product_flops, step_of
from workload import CONFIG, job_of

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load_machine() -> Machine:
    """The figures under docs/."""
    attention, shares = load(DOCS / "ring_attention.json"), {}
    for tokens in (2048, 4096, 8192, 16384, 32768):
        for _, entry in runs_of(attention, Row(32, 8, tokens), "flash_attn_4")[:1]:
            shares[tokens] = max(share_of_ideal(entry, mode) for mode in finished(entry) if mode != ONE_GPU)
    return Machine(json.loads((DOCS / "machine.json").read_text()), shares)


def check_table(machine: Machine, measured: dict[str, dict[str, Any]]) -> str:
    """Markdown: predicted beside measured, every row of ours that the model covers."""
    rows = []
    for row in measured.values():
        if "failed" in row or row["system"] != "ringzero" or row["gpus"] < 2 or row.get("alone"):
            continue
        job = job_of([f"model.num_hidden_layers={row['layers']}", *row["settings"]])
        if job.parallel.tensor_parallel_size > 1 or job.training.compile is False:
            continue
        predicted = step_of(job, machine, row["gpus"], measured_policies(job, row)).total
        figures = (predicted, row["seconds"], predicted / row["seconds"])
        rows.append([row["run"], row["row"], str(row["layers"]), *(f"{figure:.3f}" for figure in figures)])
    return markdown(["run", "row", "layers", "predicted s", "measured s", "predicted / measured"], rows)


def parts_table(machine: Machine) -> str:
    """Markdown: where a step of the 8B shape goes on two GPUs."""
    jobs = {
        "8k, ZeRO-3, selective": job_of(["training.activation_checkpointing=selective"]),
        "8k, ZeRO-2, selective": job_of(["training.activation_checkpointing=selective", "parallel.zero_stage=2"]),
        "64k, cp 2, ZeRO-3, attention": job_of(
            [
                "training.activation_checkpointing=attention",
                "training.sequence_length=65536",
                "parallel.context_parallel_size=2",
            ]
        ),
    }
    parts = list(Step.__dataclass_fields__)
    steps = {name: step_of(job, machine, 2) for name, job in jobs.items()}
    rows = [
        [name, *(f"{getattr(step, part):.3f}" for part in parts), f"{step.total:.3f}"] for name, step in steps.items()
    ]
    return markdown(["seconds of a step", *parts, "all"], rows)


def scaling_table(machine: Machine) -> str:
    """Markdown: tokens/s/GPU of the 8B shape from 2 to 64 GPUs, 4.2 million tokens a step at each size."""
    layouts = {
        "8k, ZeRO-3": ["training.activation_checkpointing=selective"],
        "8k, ZeRO-2": ["training.activation_checkpointing=selective", "parallel.zero_stage=2"],
        "64k, cp 8, ZeRO-3": [
            "training.activation_checkpointing=attention",
            "training.sequence_length=65536",
            "training.global_batch_size=64",
            "parallel.context_parallel_size=8",
        ],
    }
    sizes = (2, 8, 16, 32, 64)
    rows = []
    quarter = replace(machine, network=machine.network / 4)
    for name, settings in layouts.items():
        job = load_job(CONFIG, ["data.document_mask=false", *settings])
        for network, model in (("400 Gb/s a GPU", machine), ("100 Gb/s a GPU", quarter)):
            cells = []
            for gpus in sizes:
                if gpus < job.parallel.context_parallel_size:
                    cells.append("")
                    continue
                step = step_of(job, model, gpus)
                hidden = step.communication / step.total
                cells.append(f"{job.tokens_per_step / step.total / gpus:,.0f} ({hidden:.1%})")
            rows.append([name, network, *cells])
    return markdown(["layout", "network", *(f"{size} GPUs" for size in sizes)], rows)


def figures_table(machine: Machine) -> str:
    """Markdown: the inputs."""
    found, model = machine.figures, job_of([]).model

    def timed(title: str, key: str, flops: float) -> list[str]:
        return [title, f"{1e3 * found[key]:.2f} ms", f"{flops / found[key] / 1e12:.0f} TFLOP/s"]

    product = product_flops(model, found["tokens"])
    rows = [
        timed("a block's matrix products, forward", "products_forward", product),
        timed("a block's matrix products, backward", "products_backward", 2 * product),
    ]
    for name, tokens in (("attention", found["tokens"]), ("long_attention", found["long_tokens"])):
        for direction, times in (("forward", 1.0), ("backward", 2.5)):
            flops = times * 2 * tokens**2 * model.num_attention_heads * model.head_dim
            title = f"attention ({found['kernel']}), {tokens:,} tokens, {direction}"
            rows.append(timed(title, f"{name}_{direction}", flops))
    rows.append(timed("head and loss, forward and backward", "head", head_flops(model, found["tokens"])))
    for name, title in (
        ("elementwise", "elementwise work"),
        ("adamw", "fused AdamW"),
        ("gather", "gathering a block, received"),
        ("reduce", "reducing a block's gradients, received"),
    ):
        rows.append([title, f"{found[f'{name}_bytes_per_second'] / 1e9:,.0f} GB/s", ""])
    return markdown(["part, one GPU", "measured", "that is"], rows)


def tables() -> dict[str, str]:
    """What stands in the document, by the names of its marks, as the committed results make it."""
    machine, path = load_machine(), DOCS / "throughput.json"
    made = {
        "figures": figures_table(machine),
        "parts": parts_table(machine),
        "check": check_table(machine, json.loads(path.read_text()) if path.exists() else {}),
        "scaling": scaling_table(machine),
    }
    return {f"scaling_model.py: {name}": table for name, table in made.items()}


if __name__ == "__main__":
    print_or_renew(DOCS / "scaling.md", tables())
