"""How long a training step takes, from what its parts take by themselves. docs/scaling.md says it in prose.

Letters: S sequence length, t tokens of a rank's micro-batch, L layers, n parameters of a block, N of the model, E
hidden_size, F intermediate_size, K key/value heads, D head_dim, z ranks of dp x cp, a accumulation steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.config import JobConfig
from launch.memory.parameters import count_parameters
from launch.memory.recompute_plan import recompute_plan
from model.config import ModelConfig
from model.recompute import Recompute

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
    """One GPU's figures (`trace_figures.py`), and the network that was not measured."""

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
    """What computing does not hide."""
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


def step_of(job: JobConfig, machine: Machine, gpus: int, policies: Sequence[Recompute] | None = None) -> Step:
    """A step of `job` at ZeRO stage 2 or 3, without tensor parallelism, on `gpus`. `policies`: of each block, where
    they are not what the job would choose now."""
    assert job.parallel.tensor_parallel_size == 1 and job.parallel.zero_stage in (2, 3)
    accumulation, share = job.accumulation_steps(gpus), local_tokens(job) / machine.figures["tokens"]
    policies = policies or recompute_plan(job, job.mesh_shape(gpus), "cuda").policies
    blocks = [computed(job, machine, policy) for policy in policies]
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


def measured_policies(job: JobConfig, row: dict[str, Any]) -> list[Recompute]:
    """As configured, or as a measured row notes what `auto` chose then: by today's estimate it may choose others."""
    configured = job.training.activation_checkpointing
    if configured != "auto":
        return [configured] * job.model.num_hidden_layers
    note = row["attention"].split("recomputation: ")[1]
    runs = re.findall(r"(\w+) in (?:the first|the other|all) (\d+)(?: blocks)?", note)
    policies = [policy for policy, count in runs for _ in range(int(count))]
    assert len(policies) == job.model.num_hidden_layers, note
    return policies


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

    Norms and residual sums 9 E, rotation 2 (E + K D), SwiGLU 3 F numbers of bf16.
    """
    keys = model.num_key_value_heads * model.head_dim
    return BF16 * (9 * model.hidden_size + 2 * (model.hidden_size + keys) + 3 * model.intermediate_size)


def communication(job: JobConfig, machine: Machine, gpus: int, passes: tuple[float, float]) -> float:
    """What a block's communication adds to its computing, forward and backward together.

    What takes no longer than computing costs nothing more: the figures of computing were taken beside communication.
    """
    block = block_parameters(job.model)
    gather = gathering(job, machine, gpus, block)
    busy = [gather, gather + reduction(job, machine, gpus, block)]
    return sum(max(0.0, links - compute) for links, compute in zip(busy, passes, strict=True))


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
