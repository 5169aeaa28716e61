"""The plan of recomputation: as little as fits, and what a mix of policies is estimated to keep."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from launch.check import layout_report
from launch.config import JobConfig, load_job
from launch.memory.footprint import footprint
from launch.memory.formulas import Activations
from launch.memory.recompute_plan import ASSUMED_MEMORY, BUDGET_SHARE, planned_footprint, recompute_plan
from model.recompute import Recompute
from parallel.mesh import MeshShape

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS, GIB = 32, 2**30
LADDER: tuple[Recompute, ...] = ("none", "selective", "attention", "full")


@cache
def job_with(*overrides: str) -> JobConfig:
    return load_job(CONFIGS / "llama3-8b-8k.yaml", ["training.activation_checkpointing=auto", *overrides], 2)


def activations(*policies: Recompute) -> Activations:
    job = job_with()
    return footprint(job, job.mesh_shape(2), "cuda", policies).activations


@pytest.mark.parametrize(("more", "less"), [(b, a) for i, a in enumerate(LADDER) for b in LADDER[i + 1 :]])
@pytest.mark.parametrize("count", [1, 13, 31])
def test_a_mix_keeps_what_its_blocks_keep(more: Recompute, less: Recompute, count: int) -> None:
    """Between the two policies for all blocks, in proportion."""
    ends = {policy: activations(*(policy,) * LAYERS).kept for policy in (more, less)}
    mix = activations(*(more,) * count, *(less,) * (LAYERS - count))
    assert mix.kept == ends[less] + count * (ends[more] - ends[less]) // LAYERS


def test_what_recomputes_nothing_is_gone_when_the_first_blocks_compute_again() -> None:
    all_selective, none = activations(*["selective"] * LAYERS), activations(*["none"] * LAYERS)
    assert none.recomputed == none.freed == all_selective.freed == 0
    per_block = (none.kept - 2**26) // LAYERS  # but for the last norm's input, 8,192 x 4,096 x 2 bytes
    mix = activations(*["selective"] * 30, "none", "none")
    assert mix.freed == 2 * per_block and mix.recomputed == all_selective.recomputed
    assert Activations(kept=100, recomputed=50, head=10, context=5, tile=3, freed=30).peak == 125
    assert Activations(kept=100, recomputed=50, head=40, context=5, tile=3, freed=30).peak == 140
    assert Activations(kept=100, recomputed=50, head=10, context=5, tile=30, freed=90).peak == 130


def weight(policies: tuple[Recompute, ...]) -> tuple[int, int]:
    """How much a plan recomputes: the policy of its first block, then of how many blocks."""
    return LADDER.index(policies[0]), policies.count(policies[0])


@pytest.mark.parametrize("overrides", [(), ("training.micro_batch_size=2",), ("parallel.zero_stage=2",)])
def test_more_memory_never_recomputes_more(overrides: tuple[str, ...]) -> None:
    job = job_with(*overrides)
    mesh = job.mesh_shape(2)
    plans = [recompute_plan(job, mesh, "cuda", memory * GIB) for memory in range(70, 260, 3)]
    fits = [not plan.reason.startswith("nothing fits") for plan in plans]
    weights = [weight(plan.policies) for plan, fit in zip(plans, fits, strict=True) if fit]
    assert weights == sorted(weights, key=lambda pair: (pair[0], pair[1] if pair[0] else 0), reverse=True)
    assert len(set(weights)) > 10 and weights[-1] == (0, LAYERS)
    assert fits == sorted(fits) and not fits[0]


def test_the_plan_fits_and_the_next_cheaper_one_does_not() -> None:
    job = job_with("training.memory_budget_gib=104")
    mesh = job.mesh_shape(2)
    plan = recompute_plan(job, mesh, "cuda", 80 * GIB)  # what is configured counts
    (policy, count), rest = (plan.policies[0], plan.policies.count(plan.policies[0])), plan.policies[-1]
    assert (policy, rest) == ("selective", "none") and 1 < count < LAYERS
    cheaper: list[Recompute] = ["selective"] * (count - 1) + ["none"] * (LAYERS - count + 1)
    assert footprint(job, mesh, "cuda", plan.policies).peak <= 104 * GIB < footprint(job, mesh, "cuda", cheaper).peak
    assert planned_footprint(job, mesh, "cuda") == footprint(job, mesh, "cuda", plan.policies)
    assert str(plan) == (
        f"selective in the first {count} blocks, none in the other {LAYERS - count}: estimated peak "
        f"{footprint(job, mesh, 'cuda', plan.policies).peak / GIB:.4g} GiB of memory_budget_gib 104"
    )


def test_where_nothing_fits_the_least_is_taken_and_said() -> None:
    job = job_with("training.sequence_length=1048576", "training.global_batch_size=2")
    plan = recompute_plan(job, MeshShape(data_parallel_size=2), "cuda", 80 * GIB)
    assert "nothing fits: the least peak is" in plan.reason and "training.mlp_tile_tokens" in str(plan)
    peaks = [footprint(job, job.mesh_shape(2), "cuda", [policy] * LAYERS).peak for policy in LADDER]
    assert footprint(job, job.mesh_shape(2), "cuda", plan.policies).peak <= min(peaks)


def test_the_check_shows_the_plan() -> None:
    job = job_with()
    unseen, seen = layout_report(job, 2), layout_report(job, 2, "cuda", 115 * GIB)
    assert f"{BUDGET_SHARE * ASSUMED_MEMORY / GIB:.4g} GiB, 90% of an assumed device's 80 GiB" in unseen
    assert "recomputation    selective in the first" in seen and "GiB, 90% of the device's 115 GiB" in seen
    fixed = load_job(CONFIGS / "llama3-8b-8k.yaml", ["training.activation_checkpointing=full"], 2)
    assert "90%" not in layout_report(fixed, 2)
    assert recompute_plan(fixed, fixed.mesh_shape(2), "cuda").policies == ("full",) * LAYERS


def test_offloaded_activations_are_on_the_host() -> None:
    """Two blocks' inputs, and attention's outputs, are on the device; log-sum-exp, 1 / 64 of an input, stays there."""
    tokens = 131_072
    sizes = [
        f"training.sequence_length={2 * tokens}",
        "parallel.context_parallel_size=2",
        "training.global_batch_size=1",
    ]
    sizes += ["parallel.context_parallel_mode=exchange", "training.offload_activations=cpu"]
    for policy, states in (("full", 1), ("attention", 2)):
        job = load_job(CONFIGS / "llama3-8b-8k.yaml", [*sizes, f"training.activation_checkpointing={policy}"], 2)
        found = footprint(job, job.mesh_shape(2), "cuda", recompute_plan(job, job.mesh_shape(2), "cuda").policies)
        assert found.activations.host == LAYERS * states * GIB
        statistics = LAYERS * tokens * 4 * 32 * (policy == "attention")
        assert found.activations.kept == 2 * states * GIB + GIB + statistics
        assert "offloaded" in layout_report(job, 2)
