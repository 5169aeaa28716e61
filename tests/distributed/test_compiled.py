"""Compiled blocks: compiled once for all blocks, and not again for another step or for other documents."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from launch.build import build_engine
from launch.config import JobConfig
from launch.memory.footprint import footprint
from launch.memory.recompute_plan import recompute_plan
from model.kernels import Documents
from parallel.mesh import ParallelMesh
from tests.distributed.harness import run_distributed

LENGTH, LAYERS = 64, 12
"""More layers than torch compiles anew for by default (8)."""


def _job(checkpointing: str, tp: int = 1, cp: int = 2, stage: int = 3, layers: int = LAYERS) -> JobConfig:
    return JobConfig.from_yaml(f"""
model: {{vocab_size: 256, hidden_size: 32, intermediate_size: 48, num_hidden_layers: {layers}, num_attention_heads: 4,
  num_key_value_heads: 2, attention_backend: cpu}}
parallel: {{tensor_parallel_size: {tp}, context_parallel_size: {cp}, zero_stage: {stage}}}
data: {{source: python_stdlib, document_mask: true}}
optimizer: {{learning_rate: 0.003, schedule: constant}}
training: {{sequence_length: {LENGTH}, global_batch_size: {2 // (tp * cp)}, max_steps: 9, precision: bf16,
  compile: true, {checkpointing}}}
""")


def _mixed() -> JobConfig:
    """With a budget for five selective blocks, the rest without recomputation."""
    job, policies = _job("activation_checkpointing: none"), ("selective",) * 5 + ("none",) * (LAYERS - 5)
    budget = footprint(job, job.mesh_shape(2), "cpu", policies).peak / 2**30
    job = _job(f"activation_checkpointing: auto, memory_budget_gib: {budget!r}")
    assert recompute_plan(job, job.mesh_shape(2), "cpu").policies == policies
    return job


def _compilations(job: JobConfig, backend: str = "inductor") -> tuple[int, int]:
    """Graphs compiled in the first three steps, and in the three after."""
    torch.compile = partial(torch.compile, backend=backend)
    mesh = ParallelMesh.create(job.mesh_shape(dist.get_world_size()))
    engine, _ = build_engine(job, mesh, torch.device("cpu"))
    length = LENGTH // mesh.cp_size
    ids, positions = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None]

    def steps(*cuts: tuple[int, ...]) -> int:
        before = counters["stats"]["unique_graphs"]
        for inner in cuts:
            documents = Documents.from_boundaries([0, *inner, LENGTH], "cpu")
            loss, _ = engine(ids, positions, ids, documents)
            engine.backward(loss)
            engine.step(1e-3)
        return counters["stats"]["unique_graphs"] - before

    first = steps((9,), (3, 40), (1, 2, 3))
    torch.compiler.set_stance("fail_on_recompile")
    return first, steps((5, 6, 7, 8), (31, 33), (2, 4, 6, 8, 10, 12))


@pytest.mark.parametrize("mixed", [False, True])
def test_blocks_are_compiled_once(mixed: bool) -> None:
    """For each policy: a graph for a number of documents, and one for any number; and the head's two."""
    policies = 2 if mixed else 1
    job = _mixed() if mixed else _job("activation_checkpointing: selective")
    for first, later in run_distributed(_compilations, 2, job):
        assert 2 + policies <= first <= 2 + 2 * policies
        assert later == 0


def _compilations_of(jobs: list[JobConfig]) -> list[tuple[int, int]]:
    found = []
    for job in jobs:
        found.append(_compilations(job, "eager"))
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    return found


def test_other_layouts_are_compiled_once() -> None:
    """As many graphs, the head's two included; only captured here, which is quick. Stage 0 comes last, because
    DeepSpeed's autocast stays on."""
    selective = "activation_checkpointing: selective"
    jobs = [_job(selective, tp, 1, stage, layers=2) for tp, stage in ((2, 3), (1, 2), (1, 0))]
    for found in run_distributed(_compilations_of, 2, jobs):
        assert [(3 <= first <= 4, later) for first, later in found] == [(True, 0)] * 3, found
