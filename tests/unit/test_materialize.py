"""Weights do not depend on the layout: every slice of every layout equals that slice of the whole.

R rows, C columns of a full parameter; T tensor_parallel_size.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import parallel.materialize
from parallel.materialize import materialize
from parallel.tensor import TensorShard
from parallel.vocab import padded_vocabulary

CPU = torch.device("cpu")


class Weights(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device="meta")))


def filled(
    model: nn.Module,
    shards: dict[str, TensorShard],
    distribution: Callable[[str], tuple[float, float]] = lambda name: (0.0, 0.02),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    partition: Callable[[nn.Module], None] = lambda module: None,
) -> dict[str, Tensor]:
    materialize(model, shards, distribution, seed=seed, device=CPU, dtype=dtype, partition=partition)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def whole(shape: tuple[int, ...], name: str = "w", mean: float = 0.0, std: float = 0.02, seed: int = 0) -> Tensor:
    return filled(Weights(**{name: shape}), {name: TensorShard(shape)}, lambda _: (mean, std), seed)[name]


@settings(max_examples=80)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 12),
    size=st.integers(1, 5),
    dim=st.sampled_from([0, 1]),
    chunk_elements=st.integers(1, 100),
)
def test_every_slice_equals_the_slice_of_the_whole(
    rows: int, columns: int, size: int, dim: int, chunk_elements: int
) -> None:
    # Small chunks, so that slices start and stop in the middle of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.materialize, "_CHUNK_ELEMENTS", chunk_elements)
        full_shape = (rows, columns)
        full = whole(full_shape)
        per_rank = padded_vocabulary(full_shape[dim], size) // size
        for rank in range(size):
            start = min(rank * per_rank, full_shape[dim])
            length = min(per_rank, full_shape[dim] - start)  # the last ranks may hold padding only
            local_shape = (per_rank, columns) if dim == 0 else (rows, per_rank)
            shard = TensorShard(full_shape, dim, start, length)
            local = filled(Weights(w=local_shape), {"w": shard})["w"]
            assert local.shape == local_shape
            assert torch.equal(local.narrow(dim, 0, length), full.narrow(dim, start, length))
            padding = local.narrow(dim, length, per_rank - length)
            assert not padding.any(), "padding starts at zero"


def test_slices_of_a_matrix_of_several_chunks() -> None:
    rows, columns = 5000, 2000  # 10 million elements: three chunks of the real size
    full = whole((rows, columns))
    for start, length in ((0, 2500), (2500, 2500), (2097, 1)):
        shard = TensorShard((rows, columns), 0, start, length)
        assert torch.equal(filled(Weights(w=(length, columns)), {"w": shard})["w"], full[start : start + length])
    shard = TensorShard((rows, columns), 1, 1500, 500)
    assert torch.equal(filled(Weights(w=(rows, 500)), {"w": shard})["w"], full[:, 1500:])


def test_vectors_are_cut_too() -> None:
    full = whole((20,))
    for start in range(0, 20, 5):
        assert torch.equal(
            filled(Weights(w=(5,)), {"w": TensorShard((20,), 0, start, 5)})["w"], full[start : start + 5]
        )


def correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs().item()


def test_the_distribution_is_the_one_asked_for() -> None:
    weight = whole((500, 400), mean=0.5, std=0.3).double()
    deviation = (weight - 0.5) / 0.3
    assert abs(deviation.mean()) < 0.01 and abs(deviation.std() - 1) < 0.01
    assert abs((deviation.abs() < 1).double().mean() - 0.6827) < 0.005, "normal"
    assert deviation.abs().max() < 6
    assert torch.equal(whole((7,), mean=1.0, std=0.0), torch.ones(7))


def test_streams_depend_on_the_seed_the_name_and_the_chunk_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.materialize, "_CHUNK_ELEMENTS", 100 * 100)
    shape = (200, 100)
    first = whole(shape)
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(first, whole(shape)), "the global generator has no part in it"
    beside_others = filled(
        Weights(a=(3, 5), w=shape, z=(9,)),
        {"a": TensorShard((3, 5)), "w": TensorShard(shape), "z": TensorShard((9,))},
    )
    assert torch.equal(first, beside_others["w"]), "nor have the parameters before it"
    assert correlation(first, whole(shape, seed=1)) < 0.05
    assert correlation(first, whole(shape, name="v")) < 0.05
    assert correlation(first[:100], first[100:]) < 0.05, "chunks of one parameter differ"


def test_half_precision_weights_are_the_rounded_fp32_ones() -> None:
    full = whole((30, 7))
    rounded = filled(Weights(w=(30, 7)), {"w": TensorShard((30, 7))}, dtype=torch.bfloat16)["w"]
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, full.bfloat16())


def test_each_module_is_partitioned_once_when_it_alone_is_new() -> None:
    """And a parameter of two modules is filled once and stays one parameter."""
    with torch.device("meta"):
        embedding, inner, head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, nn.Sequential(inner, nn.ReLU()), head)
    shards = {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    partitioned: list[nn.Module] = []
    asked: list[str] = []

    def partition(module: nn.Module) -> None:
        partitioned.append(module)
        assert not any(parameter.is_meta for parameter in module.parameters(recurse=False)), "filled before"
        later = [m for m in (embedding, inner) if m not in partitioned]
        assert all(parameter.is_meta for m in later for parameter in m.parameters()), "and nothing ahead of its turn"

    def distribution(name: str) -> tuple[float, float]:
        asked.append(name)
        return 0.0, 1.0

    filled(model, shards, distribution, partition=partition)
    assert partitioned == [embedding, inner, head]
    assert sorted(asked) == sorted(shards) == ["0.weight", "1.0.bias", "1.0.weight"]
    assert head.weight is embedding.weight and isinstance(head.weight, nn.Parameter)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
