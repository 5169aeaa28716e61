"""The mesh's arithmetic, without a process group."""

from __future__ import annotations

from itertools import product

import pytest

from parallel.mesh import MeshShape

SHAPES = [MeshShape(*sizes) for sizes in product((1, 2, 3), (1, 2, 4), (1, 2, 5))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_and_coordinates_are_each_others_inverse(shape: MeshShape) -> None:
    places = [shape.coordinates(rank) for rank in range(shape.world_size)]
    axes = (shape.tensor_parallel_size, shape.context_parallel_size, shape.data_parallel_size)
    assert sorted(places) == sorted(product(*map(range, axes))), "each place is taken once"
    assert [shape.grid[dp, cp, tp] for tp, cp, dp in places] == list(range(shape.world_size))


def test_tensor_parallelism_is_innermost_and_data_parallelism_outermost() -> None:
    shape = MeshShape(tensor_parallel_size=2, context_parallel_size=3, data_parallel_size=4)
    assert shape.world_size == 24
    assert shape.grid[2, 1].tolist() == [14, 15]
    assert shape.grid[2, :, 1].tolist() == [13, 15, 17]
    assert shape.grid[:, 1, 1].tolist() == [3, 9, 15, 21]
    assert shape.coordinates(15) == (1, 1, 2)
    assert str(shape) == "tp 2 x cp 3 x dp 4"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fit_finds_the_data_parallel_size(shape: MeshShape) -> None:
    assert MeshShape.fit(shape.world_size, shape.tensor_parallel_size, shape.context_parallel_size) == shape


@pytest.mark.parametrize(
    ("world_size", "remedy"), [(7, "start 6 or 12 processes"), (5, "start 6 processes"), (0, "start 6 processes")]
)
def test_fit_refuses_a_world_that_does_not_divide(world_size: int, remedy: str) -> None:
    with pytest.raises(ValueError) as caught:
        MeshShape.fit(world_size, 2, 3)
    message = str(caught.value)
    assert f"world size ({world_size})" in message and "2 x 3 = 6" in message and remedy in message
