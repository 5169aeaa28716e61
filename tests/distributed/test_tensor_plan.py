"""Tensor-parallel plans: which rectangle of each parameter a rank holds, and what does not split."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.head import Head
from parallel.tensor import (
    TensorShard,
    apply_tensor_parallel,
    check_head_divisibility,
    style_of,
)
from parallel.vocab import padded_vocabulary
from tests.distributed.harness import run_distributed
from tests.distributed.tensor_twins import (
    FEED_FORWARD_PLAN,
    E,
    F,
    FeedForwardTwin,
)


def _plans() -> bool:
    world = dist.new_group([0, 1])
    with torch.device("meta"):
        untouched = FeedForwardTwin()
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    shards = apply_tensor_parallel(untouched, FEED_FORWARD_PLAN, alone)
    assert type(untouched.inner[0]) is nn.Linear and shards == {
        "entry.weight": TensorShard((E,)),
        "inner.0.weight": TensorShard((F, E)),
        "inner.2.weight": TensorShard((E, F)),
    }
    with torch.device("meta"):
        model = FeedForwardTwin()
        with pytest.raises(ValueError, match="'sideways' matches no module of FeedForwardTwin"):
            apply_tensor_parallel(model, {"sideways": "column"}, world)
        with pytest.raises(ValueError, match="unknown tensor-parallel style 'diagonal'"):
            apply_tensor_parallel(model, {"inner.0": "diagonal"}, world)
    rank = dist.get_rank()
    shards = apply_tensor_parallel(model, FEED_FORWARD_PLAN, world, sequence_parallel=True)
    assert shards == {
        "entry.weight": TensorShard((E,), partial_gradient=True),
        "inner.0.weight": TensorShard((F, E), 0, rank * 12, 12),
        "inner.2.weight": TensorShard((E, F), 1, rank * 12, 12),
    }
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is allocated yet"

    with torch.device("meta"):
        tied = nn.Sequential(nn.Embedding(61, E), Head(E, 61))
        tied[1].weight = tied[0].weight
    shards = apply_tensor_parallel(tied, {"0": "vocab_embedding", "1": "vocab_head"}, world)
    assert tied[0].weight is tied[1].weight and tied[0].weight.shape == (31, E)
    assert shards == {"0.weight": TensorShard((61, E), 0, rank * 31, 31 - rank)}
    return True


def test_plans_applied_and_refused() -> None:
    assert all(run_distributed(_plans, 2))


def test_the_first_matching_pattern_gives_the_style() -> None:
    plan = {"layers.*.q_proj": "column", "layers.*": "row"}
    assert style_of("layers.3.q_proj", plan) == "column"
    assert style_of("layers.3.other", plan) == "row"
    assert style_of("norm", plan) == "replicated"


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 3), (32, 8, 16), (4, 1, 2)])
def test_heads_that_do_not_split(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(ValueError) as caught:
        check_head_divisibility(heads, kv_heads, size)
    message = str(caught.value)
    assert f"({heads})" in message and f"({kv_heads})" in message and f"({size})" in message
    assert message.endswith("valid sizes here: 1, 2, 4, 8" if kv_heads == 8 else "valid sizes here: 1")


def test_heads_that_split() -> None:
    for size in (1, 2, 4, 8):
        check_head_divisibility(32, 8, size)
    assert [padded_vocabulary(61, size) for size in (1, 2, 4)] == [61, 62, 64]
