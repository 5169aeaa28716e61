"""The step-time model against sums done by hand, on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.memory.parameters import count_parameters
from step_time import Machine, block_parameters, elementwise_bytes, measured_policies, step_of
from workload import job_of

FIGURES = {
    "tokens": 8192,
    "long_tokens": 65536,
    "products_forward": 0.005,
    "products_backward": 0.010,
    "attention_forward": 0.001,
    "attention_backward": 0.003,
    "long_attention_forward": 0.060,
    "long_attention_backward": 0.150,
    "head": 0.040,
    "elementwise_bytes_per_second": 4e12,
    "adamw_bytes_per_second": 3e12,
    "gather_bytes_per_second": 3e11,
    "reduce_bytes_per_second": 3e11,
}
MACHINE = Machine(FIGURES, {8192: 0.9, 32768: 0.95})
SELECTIVE = "training.activation_checkpointing=selective"


def test_a_step_on_two_gpus() -> None:
    job = job_of([SELECTIVE])
    step = step_of(job, MACHINE, 2)
    times = 8 * 32  # micro-batches, layers
    assert step.products == pytest.approx(times * 0.015)
    assert step.attention == pytest.approx(times * 0.004)
    assert step.head == pytest.approx(8 * 0.040)
    # Norms and sums 9 x 4096, rotation 2 x (4096 + 1024), SwiGLU 3 x 14336 numbers of 2 bytes; once forward, twice
    # backward, once again.
    assert elementwise_bytes(job.model) == 2 * (9 * 4096 + 2 * 5120 + 3 * 14336)
    assert step.elementwise == pytest.approx(times * 4 * 8192 * elementwise_bytes(job.model) / 4e12)
    parameters, block = 8_030_261_248, 218_112_000
    assert count_parameters(job.model) == parameters and block_parameters(job.model) == block
    assert step.optimizer == pytest.approx(parameters / 2 * (28 / 3e12 + 18 / 4e12))
    assert step.gradients == pytest.approx(8 * parameters * (6 + 12 / 2) / 4e12)
    # All of a block's traffic hides behind it. What nothing hides: the first block with embedding and head gathered,
    # the last with the embedding reduced.
    table = 128256 * 4096
    alone = (block + 2 * table) / 3e11 + 2 * (block + table) / 3e11
    assert step.communication == pytest.approx(8 * alone)
    assert step.total == pytest.approx(sum(vars(step).values()))


def test_stage_2_gathers_once_and_reduces_twice_over() -> None:
    step = step_of(job_of([SELECTIVE, "parallel.zero_stage=2"]), MACHINE, 2)
    parameters, block, table = 8_030_261_248, 218_112_000, 128256 * 4096
    reduced = 2 * 2 / 3e11  # all-reduced, fp32, half of it received, at 300 GB/s
    alone = reduced * (block + table)
    assert step.communication == pytest.approx(8 * alone + parameters / 3e11)


def test_a_plan_of_two_policies_costs_what_its_blocks_cost() -> None:
    policies = {"auto": ["training.memory_budget_gib=130"], "none": [], "selective": []}
    auto, none, selective = (
        step_of(
            job_of(["training.micro_batch_size=2", f"training.activation_checkpointing={policy}", *more]), MACHINE, 2
        )
        for policy, more in policies.items()
    )
    assert none.total < auto.total < selective.total


def test_a_measured_row_is_predicted_with_the_policies_it_had() -> None:
    """And not with those that `auto` would choose by today's estimate of memory."""
    jobs = {
        policy: job_of(["training.micro_batch_size=2", f"training.activation_checkpointing={policy}"])
        for policy in ("auto", "none", "selective")
    }
    note = (
        "attention kernel x: y; recomputation: selective in the first 24 blocks, none in the other 8: estimated peak z"
    )
    policies = measured_policies(jobs["auto"], {"attention": note})
    row = step_of(jobs["auto"], MACHINE, 2, policies).total
    none, selective = (step_of(jobs[policy], MACHINE, 2).total for policy in ("none", "selective"))
    assert row == pytest.approx((24 * selective + 8 * none) / 32)


def test_recomputation_costs_what_it_computes() -> None:
    steps = {
        policy: step_of(job_of([f"training.activation_checkpointing={policy}"]), MACHINE, 2)
        for policy in ("none", "selective", "attention", "full")
    }
    assert steps["selective"].total - steps["none"].total == pytest.approx(steps["none"].elementwise / 3)
    assert steps["attention"].products == pytest.approx(steps["none"].products * 4 / 3)
    assert steps["attention"].attention == steps["none"].attention
    assert steps["full"].attention == pytest.approx(steps["none"].attention * 5 / 4)


def test_context_parallelism_shares_attention_as_measured() -> None:
    job = job_of([SELECTIVE, "training.sequence_length=65536", "parallel.context_parallel_size=2"])
    step = step_of(job, MACHINE, 2)
    assert step.attention == pytest.approx(2 * 32 * 0.210 / 2 / 0.95)
    assert step.products == pytest.approx(2 * 32 * 4 * 0.015)


def test_a_slow_network_is_not_hidden() -> None:
    job = job_of([SELECTIVE, "training.global_batch_size=512"])
    inside, between = step_of(job, MACHINE, 8), step_of(job, MACHINE, 64)
    assert between.products == pytest.approx(inside.products / 8)
    slow = replace(MACHINE, network=1e9)
    step = step_of(job, slow, 64)
    # Gathering twice in bf16 and reducing in fp32 through 8 GB/s a node: far longer than a block computes.
    block = block_parameters(job.model)
    compute = (step.products + step.attention + step.elementwise) / 8
    links = 32 * (8 * block * 7 / 8 / 8e9 + 3 * 63 * 5e-6)
    assert step.communication / 8 > links - compute > 10 * between.communication / 8
