"""Tensor-parallel layers against their dense twins: outputs and all gradients, fp32 and fp64, T = 2 and 4.

Shapes as in `tests.distributed.tensor_twins`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.kernels import linear_cross_entropy
from parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from parallel.vocab import VocabParallelEmbedding, VocabParallelHead, padded_vocabulary
from tests.distributed.harness import run_distributed
from tests.distributed.tensor_twins import (
    FEED_FORWARD_PLAN,
    HEAD_PLAN,
    HEADS_PLAN,
    B,
    E,
    F,
    FeedForwardTwin,
    HeadsTwin,
    HeadTwin,
    S,
    close,
    compare_gradients,
    dense_loss,
    parallel_twin,
    random,
    tensor_groups,
)


def check_region(
    build: Callable[[], nn.Module],
    plan: dict[str, str],
    group: ProcessGroup,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
) -> nn.Module:
    """With sequence parallelism each rank gives and takes its part of the tokens."""
    dense, model, shards = parallel_twin(build, plan, group, dtype, sequence_parallel)
    x, upstream = random(B, S, E, seed=1).requires_grad_(), random(B, S, E, seed=2)
    length = S // group.size()
    mine = slice(length * dist.get_rank(group), length * (dist.get_rank(group) + 1)) if sequence_parallel else slice(S)
    local_x = x.detach()[:, mine].to(dtype, copy=True).requires_grad_()
    out, expected = model(local_x), dense(x)
    out.backward(upstream[:, mine].to(dtype))
    expected.backward(upstream)
    close(out, expected[:, mine], "output")
    assert local_x.grad is not None and x.grad is not None
    close(local_x.grad, x.grad[:, mine], "gradient of the input")
    compare_gradients(dense, model, shards)
    return model


def check_embedding(group: ProcessGroup, dtype: torch.dtype, vocab_size: int) -> None:
    dense, model, shards = parallel_twin(
        lambda: nn.Sequential(nn.Embedding(vocab_size, E)), {"0": "vocab_embedding"}, group, dtype
    )
    embedding = model.get_submodule("0")
    assert isinstance(embedding, VocabParallelEmbedding)
    assert embedding.weight.shape[0] == padded_vocabulary(vocab_size, group.size()) // group.size()
    ids = torch.arange(2 * vocab_size).remainder(vocab_size).view(2, -1)  # each token twice
    upstream = random(*ids.shape, E, seed=3)
    out, expected = model(ids), dense(ids)
    out.backward(upstream.to(dtype))
    expected.backward(upstream)
    close(out, expected, "output")
    compare_gradients(dense, model, shards)


def check_head(group: ProcessGroup, dtype: torch.dtype, vocab_size: int, labels: Tensor) -> None:
    dense, model, shards = parallel_twin(lambda: HeadTwin(vocab_size), HEAD_PLAN, group, dtype)
    dense_head, parallel_head = (twin.get_submodule("head") for twin in (dense, model))
    assert isinstance(parallel_head, VocabParallelHead)
    hidden = random(*labels.shape, E, seed=4)
    local_hidden, dense_hidden = hidden.to(dtype, copy=True).requires_grad_(), hidden.requires_grad_()
    loss, count = model(local_hidden, labels)
    expected, expected_count = dense_loss(dense_head, dense_hidden, labels), (labels != -100).sum()
    (3 * loss).backward()  # losses are scaled by accumulation
    (3 * expected).backward()
    close(loss, expected, "loss")
    assert count.item() == expected_count.item()
    assert local_hidden.grad is not None and dense_hidden.grad is not None
    close(local_hidden.grad, dense_hidden.grad, "gradient of the hidden states")
    compare_gradients(dense, model, shards)
    with torch.no_grad():
        logits = parallel_head(local_hidden)
        assert logits.shape == (*labels.shape, vocab_size)
        close(logits, dense_head(dense_hidden), "logits")


def check_huge_logits(group: ProcessGroup, dtype: torch.dtype) -> None:
    """Hidden states of 1e4, and padding that would make the largest logit."""
    labels = torch.arange(30).view(2, 15) * 2
    labels[0, 5] = -100
    dense, model, shards = parallel_twin(lambda: HeadTwin(61), HEAD_PLAN, group, dtype)
    hidden = random(*labels.shape, E, seed=5) * 1e4
    local_hidden, dense_hidden = hidden.to(dtype, copy=True).requires_grad_(), hidden.requires_grad_()
    loss, _ = model(local_hidden, labels)
    expected = dense_loss(dense.get_submodule("head"), dense_hidden, labels)
    loss.backward()
    expected.backward()
    close(loss, expected, "loss")
    assert local_hidden.grad is not None and dense_hidden.grad is not None
    assert not local_hidden.grad[0, 5].any()
    close(local_hidden.grad, dense_hidden.grad, "gradient of the hidden states")
    compare_gradients(dense, model, shards)


def _layers() -> bool:
    linear_cross_entropy._CHUNK_LOGITS = 1  # chunks of 128 tokens, the least
    for group in tensor_groups():
        for dtype in (torch.float64, torch.float32):
            for sequence_parallel in (False, True):
                region = check_region(FeedForwardTwin, FEED_FORWARD_PLAN, group, dtype, sequence_parallel)
                up, down = region.get_submodule("inner.0"), region.get_submodule("inner.2")
                assert isinstance(up, ColumnParallelLinear) and up.weight.shape == (F // group.size(), E)
                assert isinstance(down, RowParallelLinear) and down.weight.shape == (E, F // group.size())
                check_region(HeadsTwin, HEADS_PLAN, group, dtype, sequence_parallel)
            for vocab_size in (64, 61, 5):  # even; padded; T = 4: the last rank holds nothing but padding
                check_embedding(group, dtype, vocab_size)
                labels = torch.arange(B * S).remainder(vocab_size).view(B, S)
                check_head(group, dtype, vocab_size, labels)
                check_head(group, dtype, vocab_size, labels.masked_fill(labels % 3 == 0, -100))
                check_head(group, dtype, vocab_size, torch.full((B, S), -100))
                check_head(group, dtype, vocab_size, torch.arange(2 * 150).remainder(vocab_size).view(2, 150))
            check_huge_logits(group, dtype)
    return True


def test_layers_equal_their_dense_twins() -> None:
    assert all(run_distributed(_layers, 4))


# -- planted faults ----------------------------------------------------------------------------------------------------


def _faults() -> dict[str, str]:
    """What the comparison says of broken layers, by the fault's name."""
    group = next(tensor_groups())
    found = {}

    def attempt(name: str, check: Callable[[], object]) -> None:
        try:
            check()
        except AssertionError as error:
            found[name] = str(error).splitlines()[0]
        dist.barrier()

    def region_fault(name: str, plan: dict[str, str], style: str, sequence_parallel: bool = False) -> None:
        build = HeadsTwin if plan is HEADS_PLAN else FeedForwardTwin
        left = {key: kept for key, kept in plan.items() if kept != style}
        attempt(name, lambda: check_region(build, left, group, torch.float64, sequence_parallel))

    region_fault("input gradient not summed", FEED_FORWARD_PLAN, "region_input")
    region_fault("output not summed", FEED_FORWARD_PLAN, "region_output")
    region_fault("partial gradient not summed", HEADS_PLAN, "partial_grad")
    labels = torch.arange(B * S).view(B, S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.tensor.copy_to_group", lambda tensor, group: tensor)
        attempt("hidden gradient not summed", lambda: check_head(group, torch.float64, 61, labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.vocab._combined", lambda statistics, group: statistics)
        attempt("statistics not combined", lambda: check_head(group, torch.float64, 61, labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.distributed.tensor_twins.sum_partial_gradients", lambda model, shards, group: None)
        attempt(
            "norm gradient of a part of the tokens",
            lambda: check_region(FeedForwardTwin, FEED_FORWARD_PLAN, group, torch.float64, True),
        )
    return found


def test_planted_faults_are_noticed() -> None:
    for found in run_distributed(_faults, 4):
        assert found.keys() == {
            "input gradient not summed",
            "partial gradient not summed",
            "hidden gradient not summed",
            "output not summed",
            "statistics not combined",
            "norm gradient of a part of the tokens",
        }
        assert all("is off by" in message for message in found.values())
