"""Tensor-parallel layers against their dense twins: outputs and all gradients, fp32 and fp64, T = 2 and 4.

The layers are made as training makes them: a plan applied on the meta device, then filled with the twin's slices. The
vocabulary's padding is filled with large numbers: were it to count anywhere, it would show.

Shapes: B batch, S sequence, E hidden_size, V vocabulary, F intermediate features, T tensor_parallel_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from model.head import Head
from model.kernels import linear_cross_entropy
from model.layers import RMSNorm
from parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorShard,
    apply_tensor_parallel,
    check_head_divisibility,
    style_of,
    sum_partial_gradients,
)
from parallel.vocab import VocabParallelEmbedding, VocabParallelHead, padded_vocabulary
from tests.distributed.harness import run_distributed

B, S, E, F = 2, 12, 8, 24
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize(model: nn.Module) -> nn.Module:
    """Gives every parameter fp64 values that depend on its name alone."""
    for name, parameter in model.named_parameters():
        parameter.data = random(*parameter.shape, seed=sum(name.encode()))
    return model


def close(result: Tensor, expected: Tensor, what: str) -> None:
    """Largest difference, relative to the largest element, or 1; a rank of padding only has nothing to compare."""
    assert result.shape == expected.shape
    if not expected.numel():
        return
    assert result.data_ptr() != expected.data_ptr(), "compared with itself"
    error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < TOLERANCES[result.dtype], f"{what} is off by {error}"


def parallel_twin(
    build: Callable[[], nn.Module],
    plan: dict[str, str],
    group: ProcessGroup,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
) -> tuple[nn.Module, nn.Module, dict[str, TensorShard]]:
    """(dense fp64, parallel in `dtype` with the dense one's slices and padding of 50, shards)."""
    dense = randomize(build())
    with torch.device("meta"):
        model = build()
    shards = apply_tensor_parallel(model, plan, group, sequence_parallel=sequence_parallel)
    model.to_empty(device="cpu").to(dtype)
    whole = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(50.0)
            parameter[inside(shards[name])] = cut(whole[name], shards[name]).to(dtype)
    sum_partial_gradients(model, shards, group)
    return dense, model, shards


def inside(shard: TensorShard) -> tuple[slice, ...]:
    """The local tensor without its padding."""
    return tuple(slice(size) for size in shard.sizes)


def cut(full: Tensor, shard: TensorShard) -> Tensor:
    return full[tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))]


def compare_gradients(dense: nn.Module, model: nn.Module, shards: dict[str, TensorShard]) -> None:
    whole = dict(dense.named_parameters())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == whole.keys() == shards.keys(), "names do not change"
    for name, parameter in parameters.items():
        gradient, expected = parameter.grad, whole[name].grad
        assert gradient is not None and expected is not None
        close(gradient[inside(shards[name])], cut(expected, shards[name]), f"gradient of {name}")
        padding = gradient.clone()
        padding[inside(shards[name])] = 0
        assert not padding.any(), "padding gets no gradient"


def tensor_groups() -> Iterator[ProcessGroup]:
    """This rank's groups of T = 4 and of T = 2; that of two is not made of neighbours."""
    yield dist.new_group([0, 1, 2, 3])
    pairs = {tuple(ranks): dist.new_group(ranks) for ranks in ([0, 2], [1, 3])}
    yield next(group for ranks, group in pairs.items() if dist.get_rank() in ranks)


# -- layers ------------------------------------------------------------------------------------------------------------


class FeedForwardTwin(nn.Module):
    """A norm and a region: column, row."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.inner = RMSNorm(E, 1e-5), nn.Sequential(nn.Linear(E, F, bias=False), nn.SiLU())
        self.inner.append(nn.Linear(F, E, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.entry(x))


class Heads(nn.Module):
    """A norm that acts on each rank's heads only, between column and row, which have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.o = RMSNorm(6, 1e-5), nn.Linear(E, 24), nn.Linear(24, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.norm(self.q(x).unflatten(-1, (-1, 6))).flatten(-2))


class HeadsTwin(nn.Module):
    """A norm and a region of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.inner = RMSNorm(E, 1e-5), Heads()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.entry(x))


FEED_FORWARD_PLAN = {"entry": "region_input", "inner": "region_output", "inner.0": "column", "inner.2": "row"}
HEADS_PLAN = {
    "entry": "region_input",
    "inner": "region_output",
    "inner.q": "column",
    "inner.norm": "partial_grad",
    "inner.o": "row",
}


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


class HeadTwin(nn.Module):
    """The head, after what stands for the last norm."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.entry, self.head = nn.Identity(), Head(E, vocab_size)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.entry(hidden), labels)


HEAD_PLAN = {"entry": "region_input", "head": "vocab_head"}


def dense_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of whole logits by torch's own cross entropy."""
    logits = head(hidden).flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


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
        patch.setattr("tests.distributed.test_tensor.sum_partial_gradients", lambda model, shards, group: None)
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


# -- the plan ----------------------------------------------------------------------------------------------------------


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
