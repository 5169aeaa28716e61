"""What a save copies from a GPU in the background: the state of its moment, whatever the steps after it change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from launch.build import build_engine
from launch.config import JobConfig
from launch.data.batches import Batches, SequenceSampler
from launch.data.corpus import Corpus
from launch.stepper import Stepper
from parallel.host_memory import _lock, host_buffer, release_host_buffer
from parallel.mesh import ParallelMesh
from parallel.zero_state import StateFragment
from tests.distributed.harness import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
STAGES = (0, 1, 3)
LENGTH = 16
JOB = f"""
model: {{vocab_size: 256, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, attention_backend: math}}
data: {{source: files, files: [unused]}}
optimizer: {{learning_rate: 0.01}}
training: {{sequence_length: {LENGTH}, global_batch_size: 2, max_steps: 100, precision: bf16, compile: false}}
"""
_CYCLES = 1_000_000_000
"""That the copying stream is held up: half a second or more, in which an optimizer step would be long done."""


Parts = dict[tuple[str, str], torch.Tensor]


def parts(fragments: Iterable[StateFragment]) -> Parts:
    """By parameter and kind."""
    return {(one.name, kind): part for one in fragments for kind, part in one.tensors.items()}


def copy_late() -> list[dict[str, Any]]:
    """By stage, twice: whether the copies were still to be made when training went on, and which of them are wrong."""
    found = []
    for stage in STAGES:
        job = JobConfig.from_yaml(JOB + f"parallel: {{zero_stage: {stage}}}\n")
        mesh = ParallelMesh.create(job.mesh_shape(1))
        engine, _ = build_engine(job, mesh, torch.device("cuda", 0))
        tokens = np.random.default_rng(3).integers(0, 64, 2000).astype(np.uint8)
        corpus = Corpus.from_documents("training", tokens, [len(tokens)], "0")
        batches = Batches(SequenceSampler(corpus, LENGTH, seed=0), 2, 1, 1, 0)
        stepper = Stepper(job, mesh, engine)
        engine.snapshot(copy=True).wait()  # makes the buffer, which may wait for the device
        for step in range(2):
            before: Parts = {key: part.detach().cpu().clone() for key, part in parts(engine.fragments()).items()}
            with torch.cuda.stream(engine._host_copies._stream):
                torch.cuda._sleep(_CYCLES)
            snapshot = engine.snapshot(copy=True)
            copied = engine._host_copies._copied
            late = copied is not None and not copied.query()
            stepper.train(step, stepper.cut(batches.micro_batches(step)))
            snapshot.wait()
            copies, after = parts(snapshot.fragments), parts(engine.fragments())
            found.append(
                {
                    "late": late,
                    "locked": all(part.is_pinned() for part in copies.values()),
                    "kept": copies.keys() == before.keys() and len(before) > 3,
                    "wrong": [key for key, part in copies.items() if not torch.equal(part, before[key].view(-1))],
                    "unchanged": [key for key, part in after.items() if torch.equal(part.cpu(), before[key])],
                }
            )
    return found


def test_a_snapshot_is_of_its_moment_though_it_is_copied_later() -> None:
    [found] = run_distributed(copy_late, 1, device_type="cuda")
    assert len(found) == 2 * len(STAGES)
    for one in found:
        assert one == {"late": True, "locked": True, "kept": True, "wrong": [], "unchanged": []}, found


def test_memory_that_cannot_be_locked_fails_no_kernel() -> None:
    device = torch.device("cuda", 0)
    count = torch.ones(8, device=device)
    buffer = host_buffer(1 << 20, device)
    assert buffer.is_pinned()
    assert _lock(buffer) == "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    assert count.sum().item() == 8
    for _ in range(2):  # the second time there is nothing to give back
        release_host_buffer(buffer, device)
        assert not buffer.is_pinned() and count.sum().item() == 8
