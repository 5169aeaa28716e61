"""Dense modules, their tensor-parallel twins, and what compares the two.

The twins are made as training makes them: a plan applied on the meta device, then filled with the dense one's slices.
The vocabulary's padding is filled with large numbers: were it to count anywhere, it would show.

Shapes: B batch, S sequence, E hidden_size, V vocabulary, F intermediate features, T tensor_parallel_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from model.head import Head
from model.layers import RMSNorm
from parallel.tensor import (
    TensorShard,
    apply_tensor_parallel,
    sum_partial_gradients,
)

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
