"""Fills a model that was built on the meta device, one module at a time, so that it never exists whole anywhere.

Every parameter is drawn from its own random stream, seeded by the job's seed and its name, in chunks of whole rows. A
rank draws only the chunks that its tensor-parallel slice touches. Every layout ends with the same full weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from parallel.tensor import TensorShard

_CHUNK_ELEMENTS = 1 << 22
"""Elements drawn at a time: 16 MiB of fp32, the most that initialisation holds beyond the parameter itself."""


def materialize(
    model: nn.Module,
    shards: Mapping[str, TensorShard],
    initial_distribution: Callable[[str], tuple[float, float]],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    partition: Callable[[nn.Module], None],
) -> None:
    """Allocates and fills every parameter of `model` on `device`, calling `partition(module)` after each module's.

    `partition` is where ZeRO-3 keeps only this rank's share; pass a function that does nothing to keep all. A parameter
    that two modules share is filled once and stays shared.
    """
    filled: dict[int, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if not module._parameters:
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in filled:
                name = names[id(parameter)]
                local = torch.zeros(parameter.shape, dtype=dtype, device=device)
                fill(local, shards[name], *initial_distribution(name), seed=seed, name=name)
                filled[id(parameter)] = nn.Parameter(local)
            module._parameters[key] = filled[id(parameter)]
        partition(module)


def fill(local: Tensor, shard: TensorShard, mean: float, std: float, *, seed: int, name: str) -> None:
    """Writes this shard's rectangle of the full parameter into `local`; padding beyond it is left as it is."""
    offsets, sizes = shard.offsets, shard.sizes
    target = local[tuple(slice(size) for size in sizes)]
    if std == 0:
        target.fill_(mean)
        return
    rows = shard.full_shape[0]
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // math.prod(shard.full_shape[1:]))
    stop = offsets[0] + sizes[0]
    for first in range(offsets[0] // rows_per_chunk * rows_per_chunk, stop, rows_per_chunk):
        count = min(rows_per_chunk, rows - first)
        generator = torch.Generator(device=local.device).manual_seed(_stream(seed, name, first))
        chunk = torch.normal(mean, std, (count, *shard.full_shape[1:]), generator=generator, device=local.device)
        low, high = max(first, offsets[0]), min(first + count, stop)
        columns = tuple(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True))
        target[low - offsets[0] : high - offsets[0]] = chunk[(slice(low - first, high - first), *columns)]


def _stream(seed: int, name: str, first_row: int) -> int:
    """A 63-bit seed that depends on nothing but the parameter and the chunk."""
    digest = hashlib.blake2b(f"{seed}/{name}/{first_row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
