"""How long a training step takes, from what its parts take by themselves: checked where it was measured, carried to 64
GPUs. Prints every number of docs/scaling.md.

    python benchmarks/scaling_model.py            # print the tables
    python benchmarks/scaling_model.py --write    # renew them in the document

Parts: docs/machine.json (`machine_figures.py`); how context parallelism shares attention: docs/ring_attention.json.
Measured steps: docs/throughput.json. Nothing is fitted to them.

Letters: S sequence length, t tokens of a rank's micro-batch, L layers, n parameters of a block, N of the model, E
hidden_size, F intermediate_size, K key and value width, z ranks of dp x cp, a accumulation steps.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attention_contest.results import finished, load, runs_of, share_of_ideal
from attention_contest.rows import ONE_GPU, Row
from launch.config import JobConfig, load_job
from launch.parameters import count_parameters
from launch.recompute_plan import recompute_plan
from model.config import ModelConfig
from model.recompute import Recompute
from workload import CONFIG, job_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
DOCUMENT = DOCS / "scaling.md"
BEGIN, END = "<!-- scaling_model.py: {} -->", "<!-- end of {} -->"
BF16, FP32 = 2, 4

ADAMW_BYTES = 28
"""Of a parameter's update: weight, gradient and two moments read, all but the gradient written, in fp32."""
AROUND_ADAMW_BYTES = 4 + 8 + 6
"""Norm of the gradient, its scaling, and the bf16 copy of the weight."""
GRADIENT_BYTES = 6
"""A bf16 gradient to the fp32 one that is reduced."""
ACCUMULATION_BYTES = 12
"""Adding a reduced gradient to the sum of the micro-batches, fp32."""


@dataclass(frozen=True)
class Machine:
    """One GPU's figures (`machine_figures.py`), and the network that was not measured."""

    figures: dict[str, Any]
    attention_share: dict[int, float]
    """Tokens of a rank -> what attention over cp ranks reaches of the kernel's own speed."""
    gpus_per_node: int = 8
    network: float = 50e9 * 0.85
    """Bytes per second into a node for each of its GPUs: a 400 Gb/s adapter each, at 85 %."""
    latency: float = 5e-6
    """Of one hop of a ring between nodes, seconds."""

    def attention(self, direction: str, length: int) -> float:
        """Seconds of one layer over a whole sequence; the square of the length from the nearer measured one."""
        near, far = self.figures["tokens"], self.figures["long_tokens"]
        name, measured = ("attention", near) if length * length < near * far else ("long_attention", far)
        return self.figures[f"{name}_{direction}"] * (length / measured) ** 2

    def share(self, local_tokens: int) -> float:
        """Of attention's ideal under context parallelism: the nearest measured number of tokens per rank."""
        return self.attention_share[min(self.attention_share, key=lambda known: abs(known - local_tokens))]

    def collective(self, kind: str, size: float, ranks: int) -> float:
        """Seconds to gather or reduce `size` bytes over `ranks`: links of a node and network work at once."""
        nodes = -(-ranks // self.gpus_per_node)
        inside = size * (ranks - 1) / ranks / self.figures[f"{kind}_bytes_per_second"]
        if nodes == 1:
            return inside
        between = size * (nodes - 1) / nodes / (self.gpus_per_node * self.network)
        return max(inside, between) + (ranks - 1) * self.latency


@dataclass(frozen=True)
class Step:
    """Seconds of one step by part."""

    products: float
    attention: float
    elementwise: float
    head: float
    gradients: float
    communication: float
    """What computing does not hide, and what it loses while it hides the rest."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Computed:
    """Seconds of one block's passes over one micro-batch: (forward, backward) of each part."""

    products: tuple[float, float]
    attention: tuple[float, float]
    elementwise: tuple[float, float]

    @property
    def passes(self) -> tuple[float, float]:
        parts = (self.products, self.attention, self.elementwise)
        return sum(part[0] for part in parts), sum(part[1] for part in parts)


def step_of(job: JobConfig, machine: Machine, gpus: int) -> Step:
    """A step of `job` at ZeRO stage 2 or 3, without tensor parallelism, on `gpus`."""
    assert job.parallel.tensor_parallel_size == 1 and job.parallel.zero_stage in (2, 3)
    accumulation, share = job.accumulation_steps(gpus), local_tokens(job) / machine.figures["tokens"]
    plan = recompute_plan(job, job.mesh_shape(gpus), "cuda")
    blocks = [computed(job, machine, policy) for policy in plan.policies]
    exposed = sum(communication(job, machine, gpus, block.passes) for block in blocks)
    return Step(
        products=accumulation * sum(sum(block.products) for block in blocks),
        attention=accumulation * sum(sum(block.attention) for block in blocks),
        elementwise=accumulation * sum(sum(block.elementwise) for block in blocks),
        head=accumulation * share * machine.figures["head"],
        gradients=accumulation * gradient_seconds(job.model, machine, gpus),
        communication=accumulation * (exposed + once_a_micro_batch(job, machine, gpus))
        + once_a_step(job, machine, gpus),
        optimizer=optimizer_seconds(job.model, machine, gpus),
    )


def local_tokens(job: JobConfig) -> int:
    """t."""
    return job.training.micro_batch_size * job.training.sequence_length // job.parallel.context_parallel_size


def computed(job: JobConfig, machine: Machine, again: Recompute) -> Computed:
    """A block that computes `again` in its backward pass."""
    cp, length, figures = job.parallel.context_parallel_size, job.training.sequence_length, machine.figures
    share = local_tokens(job) / figures["tokens"]
    forward = share * figures["products_forward"]
    products = share * figures["products_backward"] + forward * (again in ("attention", "full"))
    split = job.training.micro_batch_size / cp / (machine.share(length // cp) if cp > 1 else 1)
    attend, attend_back = (split * machine.attention(direction, length) for direction in ("forward", "backward"))
    once = local_tokens(job) * elementwise_bytes(job.model) / figures["elementwise_bytes_per_second"]
    return Computed(
        products=(forward, products),
        attention=(attend, attend_back + attend * (again == "full")),
        elementwise=(once, once * (2 + (again != "none"))),
    )


def elementwise_bytes(model: ModelConfig) -> float:
    """Of a token in one block, forward, with neighbouring operations fused; backward moves twice as many.

    Norms and residual sums 9 E, rotation 2 (E + K / 2), SwiGLU 3 F numbers of bf16.
    """
    keys = model.num_key_value_heads * model.head_dim
    return BF16 * (9 * model.hidden_size + 2 * (model.hidden_size + keys) + 3 * model.intermediate_size)


def communication(job: JobConfig, machine: Machine, gpus: int, passes: tuple[float, float]) -> float:
    """What a block's communication adds to its computing, forward and backward together.

    While links are busy, products keep the measured share of their speed; what takes longer than computing waits.
    """
    block = block_parameters(job.model)
    gather = gathering(job, machine, gpus, block)
    lost = 1 - machine.figures["products_share_beside_gathering"]
    busy = [gather, gather + reduction(job, machine, gpus, block)]
    return sum(max(lost * links, links - compute) for links, compute in zip(busy, passes, strict=True))


def gathering(job: JobConfig, machine: Machine, gpus: int, parameters: int) -> float:
    """Of parameters before they are used: stage 3 only."""
    return machine.collective("gather", BF16 * parameters, gpus) if job.parallel.zero_stage == 3 else 0.0


def reduction(job: JobConfig, machine: Machine, gpus: int, parameters: int) -> float:
    """Of their gradients in fp32. DeepSpeed's stage 2 all-reduces them, which moves them twice."""
    once = machine.collective("reduce", FP32 * parameters, gpus)
    return once if job.parallel.zero_stage == 3 else 2 * once


def once_a_micro_batch(job: JobConfig, machine: Machine, gpus: int) -> float:
    """The first block's gathering and the last one's reduction, which nothing hides; embedding and head, likewise."""
    block, table = block_parameters(job.model), job.model.vocab_size * job.model.hidden_size
    return gathering(job, machine, gpus, block + 2 * table) + reduction(job, machine, gpus, block + table)


def once_a_step(job: JobConfig, machine: Machine, gpus: int) -> float:
    """Stage 2 gathers the new weights after the update."""
    if job.parallel.zero_stage == 3:
        return 0.0
    return machine.collective("gather", BF16 * count_parameters(job.model), gpus)


def gradient_seconds(model: ModelConfig, machine: Machine, gpus: int) -> float:
    """Of a micro-batch: gradients to fp32, and this rank's share added up."""
    moved = count_parameters(model) * (GRADIENT_BYTES + ACCUMULATION_BYTES / gpus)
    return moved / machine.figures["elementwise_bytes_per_second"]


def optimizer_seconds(model: ModelConfig, machine: Machine, gpus: int) -> float:
    """The update of this rank's share, and what goes around it."""
    share = count_parameters(model) / gpus
    figures = machine.figures
    update = ADAMW_BYTES * share / figures["adamw_bytes_per_second"]
    return update + AROUND_ADAMW_BYTES * share / figures["elementwise_bytes_per_second"]


def product_flops(model: ModelConfig, tokens: int) -> float:
    """Of one block's matrix products, forward."""
    return 2.0 * tokens * (block_parameters(model) - 2 * model.hidden_size)


def head_flops(model: ModelConfig, tokens: int) -> float:
    """Of the head's products, forward and backward."""
    return 6.0 * tokens * model.vocab_size * model.hidden_size


def block_parameters(model: ModelConfig) -> int:
    """n."""
    shallower = model.model_copy(update={"num_hidden_layers": model.num_hidden_layers - 1})
    return count_parameters(model) - count_parameters(shallower)


def load_machine() -> Machine:
    """The figures under docs/."""
    attention, shares = load(DOCS / "ring_attention.json"), {}
    for tokens in (2048, 4096, 8192, 16384, 32768):
        for _, entry in runs_of(attention, Row(32, 8, tokens), "flash_attn_4")[:1]:
            shares[tokens] = max(share_of_ideal(entry, mode) for mode in finished(entry) if mode != ONE_GPU)
    return Machine(json.loads((DOCS / "machine.json").read_text()), shares)


def check_table(machine: Machine, measured: dict[str, dict[str, Any]]) -> str:
    """Markdown: predicted beside measured, every row of ours that the model covers."""
    lines = ["| run | row | layers | predicted s | measured s | predicted / measured |", "|" + " --- |" * 6]
    for row in measured.values():
        if "failed" in row or row["system"] != "ringzero" or row["gpus"] < 2:
            continue
        job = job_of([f"model.num_hidden_layers={row['layers']}", *row["settings"]])
        if job.parallel.tensor_parallel_size > 1 or job.training.compile is False:
            continue
        predicted = step_of(job, machine, row["gpus"]).total
        cells = [row["run"], row["row"], str(row["layers"]), f"{predicted:.3f}", f"{row['seconds']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {predicted / row['seconds']:.3f} |")
    return "\n".join(lines)


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
    lines = [f"| seconds of a step | {' | '.join(parts)} | all |", "|" + " --- |" * (len(parts) + 2)]
    for name, job in jobs.items():
        step = step_of(job, machine, 2)
        lines.append(f"| {name} | {' | '.join(f'{getattr(step, part):.3f}' for part in parts)} | {step.total:.3f} |")
    return "\n".join(lines)


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
    lines = [
        f"| layout | network | {' | '.join(f'{size} GPUs' for size in sizes)} |",
        "|" + " --- |" * (len(sizes) + 2),
    ]
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
            lines.append(f"| {name} | {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_table(machine: Machine) -> str:
    """Markdown: the inputs."""
    found = machine.figures
    model = job_of([]).model
    flops = product_flops(model, found["tokens"])
    lines = ["| part, one GPU | measured | that is |", "| --- | --- | --- |"]

    def products(direction: str, times: int) -> None:
        seconds = found[f"products_{direction}"]
        lines.append(
            f"| a block's matrix products, {direction} | {1e3 * seconds:.2f} ms | "
            f"{times * flops / seconds / 1e12:.0f} TFLOP/s |"
        )

    products("forward", 1)
    products("backward", 2)
    for name, tokens in (("attention", found["tokens"]), ("long_attention", found["long_tokens"])):
        for direction, times in (("forward", 1.0), ("backward", 2.5)):
            seconds = found[f"{name}_{direction}"]
            work = times * 2 * tokens**2 * model.num_attention_heads * model.head_dim
            lines.append(
                f"| attention ({found['kernel']}), {tokens:,} tokens, {direction} | {1e3 * seconds:.2f} ms | "
                f"{work / seconds / 1e12:.0f} TFLOP/s |"
            )
    head = head_flops(model, found["tokens"]) / found["head"] / 1e12
    lines.append(f"| head and loss, forward and backward | {1e3 * found['head']:.2f} ms | {head:.0f} TFLOP/s |")
    for name, title in (
        ("elementwise", "elementwise work"),
        ("adamw", "fused AdamW"),
        ("gather", "gathering a block, received"),
        ("reduce", "reducing a block's gradients, received"),
    ):
        lines.append(f"| {title} | {found[f'{name}_bytes_per_second'] / 1e9:,.0f} GB/s | |")
    if found["products_share_beside_gathering"] < 1:
        kept = found["products_share_beside_gathering"]
        lines.append(f"| products beside gathering keep | {kept:.1%} of their speed | |")
    return "\n".join(lines)


def renewed(document: str, machine: Machine, measured: dict[str, Any]) -> str:
    """The document with what stands between its markers replaced."""
    tables = {
        "figures": figures_table(machine),
        "parts": parts_table(machine),
        "check": check_table(machine, measured),
        "scaling": scaling_table(machine),
    }
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        head, rest = document.split(begin)
        document = f"{head}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return document


def main() -> None:
    """Prints the tables, or with --write renews the document."""
    machine = load_machine()
    path = DOCS / "throughput.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(renewed(DOCUMENT.read_text(), machine, measured))
    else:
        for table in (figures_table, parts_table, scaling_table):
            print(table(machine), end="\n\n")
        print(check_table(machine, measured))


if __name__ == "__main__":
    main()
