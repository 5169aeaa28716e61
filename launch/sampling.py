"""Text from the model in training, on whatever layout it trains.

Every rank runs each forward pass, so any mesh and ZeRO stage serves; the context is recomputed for every token. Shapes:
S context length, L = S / context_parallel_size, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from parallel.mesh import ParallelMesh
from parallel.sequence import local_index, shard_sequence
from parallel.zero import ZeroEngine

_ROUND = 64
"""Contexts are padded to multiples of this, so that few shapes occur. What is right of a token cannot influence it."""


@torch.no_grad()
def sample(
    engine: ZeroEngine,
    mesh: ParallelMesh,
    prompt: list[int],
    count: int,
    *,
    sequence_length: int,
    seed: int,
    temperature: float = 0.8,
) -> list[int]:
    """`count` tokens drawn after `prompt` (at least one token). Collective; every rank returns the same tokens.

    The context is the last `sequence_length` tokens.
    """
    assert prompt, "sampling starts from at least one token"
    generator = torch.Generator().manual_seed(seed)
    tokens, least = list(prompt), 2 * mesh.cp_size * mesh.tp_size  # any mesh can cut multiples of this
    engine.eval()
    for _ in range(count):
        context = tokens[-sequence_length:]
        padded = min(_rounded_up(len(context), _ROUND * least), _rounded_up(sequence_length, least))
        ids = np.zeros((1, padded), dtype=np.int64)
        ids[0, : len(context)] = context
        positions = np.arange(padded, dtype=np.int64)[None]
        inputs = [
            torch.from_numpy(np.ascontiguousarray(shard_sequence(array, mesh.cp_size, mesh.cp_rank))).to(engine.device)
            for array in (ids, positions)
        ]
        logits = engine(*inputs)
        owner, index = local_index(len(context) - 1, padded, mesh.cp_size)
        chosen = torch.zeros((), dtype=torch.int64, device=engine.device)
        threshold = torch.rand((), generator=generator)  # drawn on every rank, so that the layout changes nothing
        if mesh.cp_rank == owner:
            cumulative = (logits[0, index].float().cpu() / temperature).softmax(dim=-1).cumsum(dim=-1)
            chosen.fill_(
                torch.searchsorted(cumulative, threshold * cumulative[-1]).clamp(max=len(cumulative) - 1).item()
            )
        dist.broadcast(chosen, mesh.shape.rank_at(0, owner, 0))
        tokens.append(int(chosen.item()))
    engine.train()
    return tokens[len(prompt) :]


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
