"""The training state that ranks hold, and the full tensors that their parts make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class LocalParameter:
    """One parameter on one rank: the fp32 state it holds, and the copy it computes with."""

    local_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    dim: int | None
    start: int | None
    """Of the flat range of the local tensor that this rank keeps; None where it keeps nothing."""
    state: dict[str, np.ndarray]
    working: np.ndarray


@dataclass(frozen=True)
class RankState:
    tp_rank: int
    step_count: int
    loss_scaler: dict[str, float]
    parameters: dict[str, LocalParameter]


def assemble(ranks: Sequence[RankState]) -> dict[str, np.ndarray]:
    """KIND/NAME -> the full tensor, by concatenation alone; every element must be kept by exactly one rank."""
    full: dict[str, np.ndarray] = {}
    tp_size = max(rank.tp_rank for rank in ranks) + 1
    for name, one in ranks[0].parameters.items():
        for kind in ("parameter", "exp_avg", "exp_avg_sq"):
            slices = []
            for tp_rank in range(tp_size):
                flat = np.full(np.prod(one.local_shape), np.nan, dtype=np.float32)
                for part in (rank.parameters[name] for rank in ranks if rank.tp_rank == tp_rank):
                    if part.start is not None:
                        target = flat[part.start : part.start + part.state[kind].size]
                        assert np.isnan(target).all(), f"{kind} of {name} is kept twice"
                        target[:] = part.state[kind]
                assert not np.isnan(flat).any(), f"{kind} of {name} is kept by nobody in part"
                slices.append(flat.reshape(one.local_shape))
            if one.dim is None:
                assert all(np.array_equal(slices[0], other) for other in slices), f"{kind} of {name} differs over tp"
                whole = slices[0]
            else:
                whole = np.concatenate(slices, axis=one.dim)
                real, padding = np.split(whole, [one.full_shape[one.dim]], axis=one.dim)
                assert not padding.any(), f"{kind} of {name}: the vocabulary's padding is not zero"
                whole = real
            assert whole.shape == one.full_shape
            full[f"{kind}/{name}"] = whole
    return full


def check_working_copies(ranks: Sequence[RankState], precision: str, stage: int) -> None:
    """What computes is the fp32 state, rounded to the precision that computes."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision if stage else "fp32", torch.float32)
    full = assemble(ranks)
    for rank in ranks:
        for name, local in rank.parameters.items():
            master = full[f"parameter/{name}"]
            if local.dim is not None:
                width = local.local_shape[local.dim]
                master = np.take(
                    master,
                    range(rank.tp_rank * width, min((rank.tp_rank + 1) * width, master.shape[local.dim])),
                    axis=local.dim,
                )
                missing = [(0, size - have) for size, have in zip(local.local_shape, master.shape, strict=True)]
                master = np.pad(master, missing)
            rounded = torch.from_numpy(np.ascontiguousarray(master)).to(dtype).float().numpy()
            assert np.array_equal(local.working, rounded), f"{name} does not compute with its fp32 state"
