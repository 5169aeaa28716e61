"""Rectangles of the state: over all ranks of any layout they tile the full tensors, with the right values.

T tensor_parallel_size, Z ranks of dp x cp that cut each local tensor into flat ranges.
"""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from parallel.state import rectangles
from parallel.tensor import TensorShard
from parallel.vocab import padded_vocabulary
from parallel.zero_state import StateFragment

KINDS = ("parameter", "exp_avg", "exp_avg_sq")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int | None, int, list[float]]:
    """(full shape, cut dim, T, cut points in [0, 1] of the local tensor)."""
    full_shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=2)))
    dim = draw(st.sampled_from([None, *range(len(full_shape))]))
    size = 1 if dim is None else draw(st.integers(1, 5))
    if dim == 1:  # only a vocabulary (dim 0) is ever padded; elsewhere the cut is even
        full_shape = (full_shape[0], full_shape[1] * size)
    cuts = draw(st.lists(st.floats(0, 1), max_size=6))
    return full_shape, dim, size, cuts


def local_tensor(full: Tensor, shard: TensorShard, per_rank: int) -> Tensor:
    """This rank's slice, padded with -1 up to `per_rank` slices of the cut dim."""
    if shard.dim is None:
        return full.clone()
    shape = [per_rank if dim == shard.dim else size for dim, size in enumerate(shard.full_shape)]
    local = full.new_full(shape, -1.0)
    local.narrow(shard.dim, 0, shard.length).copy_(full.narrow(shard.dim, shard.start, shard.length))
    return local


@settings(max_examples=300)
@given(layouts())
def test_rectangles_tile_the_full_tensor(layout: tuple[tuple[int, ...], int | None, int, list[float]]) -> None:
    full_shape, dim, size, cuts = layout
    numel = torch.Size(full_shape).numel()
    fulls = {f"{kind}/w": torch.arange(numel, dtype=torch.float32).view(full_shape) + i for i, kind in enumerate(KINDS)}
    counts = {key: torch.zeros(full_shape, dtype=torch.int64) for key in fulls}
    for rank in range(size):
        shard, per_rank = TensorShard(full_shape), 0
        if dim is not None:
            per_rank = padded_vocabulary(full_shape[dim], size) // size
            start = min(rank * per_rank, full_shape[dim])
            shard = TensorShard(full_shape, dim, start, min(per_rank, full_shape[dim] - start))
        locals_ = {kind: local_tensor(fulls[f"{kind}/w"], shard, per_rank).view(-1) for kind in KINDS}
        local_numel = locals_["parameter"].numel()
        bounds = [0, *sorted(round(cut * local_numel) for cut in cuts), local_numel]
        for low, high in zip(bounds, bounds[1:], strict=False):  # empty ranges included
            fragment = StateFragment("w", low, {kind: tensor[low:high] for kind, tensor in locals_.items()})
            parts = list(rectangles(fragment, shard))
            assert len(parts) <= 3 * len(KINDS)
            for part in parts:
                assert part.full_shape == full_shape and len(part.offsets) == part.tensor.dim() == len(full_shape)
                where = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.tensor.shape, strict=True))
                assert counts[part.key][where].shape == part.tensor.shape, "inside the full tensor"
                counts[part.key][where] += 1
                assert torch.equal(part.tensor, fulls[part.key][where])
    for count in counts.values():
        assert torch.equal(count, torch.ones_like(count)), "each element exactly once"


def test_writing_into_a_rectangle_writes_into_the_fragment() -> None:
    shard = TensorShard((4, 6), 1, 3, 3)
    tensors = {kind: torch.zeros(8) for kind in KINDS}
    parts = list(rectangles(StateFragment("w", 2, tensors), shard))  # elements 2 to 9 of [4, 3]
    assert [(part.offsets, tuple(part.tensor.shape)) for part in parts if part.key == "parameter/w"] == [
        ((0, 5), (1, 1)),
        ((1, 3), (2, 3)),
        ((3, 3), (1, 1)),
    ]
    for part in parts:
        part.tensor.fill_(1.0)
    assert all(tensor.eq(1).all() for tensor in tensors.values())


def test_vocabulary_padding_is_left_out() -> None:
    shard = TensorShard((61, 4), 0, 60, 1)  # one real row; the local tensor may have more
    fragment = StateFragment("w", 2, {kind: torch.arange(2.0, 80.0) for kind in KINDS})
    parts = [part for part in rectangles(fragment, shard) if part.key == "exp_avg/w"]
    assert [(part.offsets, part.tensor.tolist()) for part in parts] == [((60, 2), [[2.0, 3.0]])]
    padding_only = StateFragment("w", 4, {kind: torch.zeros(76) for kind in KINDS})
    assert not list(rectangles(padding_only, shard))
