"""The sample that a model writes does not depend on the layout it trains in."""

from __future__ import annotations

import torch

from launch.inference.generation import generate
from launch.inference.model import attention_on_one_device
from launch.inference.sampling import Sampling
from launch.precision import DTYPES
from tests.distributed.checkpoint_ranks import LENGTH, Layout, Rank
from tests.distributed.harness import run_distributed

PROMPTS = [[5, 60, 7], [8, 0, 33, 2, 19]]


def write(layouts: list[Layout]) -> list[list[list[int]]]:
    """20 tokens from each layout's model after two steps: the context outgrows the sequence length."""
    written = []
    for layout in layouts:
        rank, job = Rank(layout), layout.job()
        rank.train(0, 2)
        rank.engine.eval()
        written.append(
            generate(
                rank.engine,
                rank.engine.model,
                attention_on_one_device(job.model, torch.device("cpu"), DTYPES["fp32"]),
                PROMPTS,
                20,
                Sampling(seed=4),
                device=torch.device("cpu"),
                window=LENGTH,
                multiple_of=rank.mesh.tp_size if job.sequence_parallel else 1,
            )
        )
    return written


def test_every_layout_writes_the_same() -> None:
    (alone,) = run_distributed(write, 1, [Layout(1, 1, 1, 0)])[0]
    layouts = [Layout(2, 2, 1, 3), Layout(1, 4, 1, 1), Layout(2, 1, 2, 2)]
    by_rank = run_distributed(write, 4, layouts)
    assert all(written == [alone] * len(layouts) for written in by_rank), (alone, by_rank)
    for written in alone:
        assert len(written) == 20 and len(set(written)) > 5
        assert all(0 <= token < 61 for token in written)
