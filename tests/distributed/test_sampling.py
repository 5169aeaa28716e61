"""The sample that a model writes does not depend on the layout it trains in."""

from __future__ import annotations

from launch.sampling import sample
from tests.distributed.checkpoint_ranks import LENGTH, Layout, Rank
from tests.distributed.harness import run_distributed

PROMPT = [5, 60, 7]


def write(layouts: list[Layout]) -> list[list[int]]:
    """20 tokens from each layout's model after two steps: the context outgrows the sequence length."""
    written = []
    for layout in layouts:
        rank = Rank(layout)
        rank.train(0, 2)
        written.append(sample(rank.engine, rank.mesh, PROMPT, 20, sequence_length=LENGTH, seed=4))
    return written


def test_every_layout_writes_the_same() -> None:
    (alone,) = run_distributed(write, 1, [Layout(1, 1, 1, 0)])[0]
    layouts = [Layout(2, 2, 1, 3), Layout(1, 4, 1, 1), Layout(2, 1, 2, 2)]
    by_rank = run_distributed(write, 4, layouts)
    assert all(written == [alone] * len(layouts) for written in by_rank), (alone, by_rank)
    assert len(alone) == 20 and len(set(alone)) > 5
    assert all(0 <= token < 61 for token in alone)
