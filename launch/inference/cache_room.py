"""Checks that a key-value cache fits before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.kv_cache import cache_bytes

_GIB = 2**30


class CacheTooLarge(ValueError):
    """More tokens than memory has room for."""


def check_cache_fits(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    asked: str,
    tensor_parallel_size: int,
    dtype: torch.dtype,
    free: int,
) -> None:
    """`asked` is what the user calls `max_tokens`; `free`: bytes that there are on a rank. Raises CacheTooLarge."""
    longest = max(map(len, prompts))
    per_token = cache_bytes(config, len(prompts), 1, config.num_key_value_heads // tensor_parallel_size, dtype)
    needed = (longest + max_tokens) * per_token
    if needed <= free:
        return
    most = free // per_token - longest
    remedy = f"{most} fit" if most > 0 else "give shorter prompts"
    if len(prompts) > 1:
        remedy += ", and more with fewer prompts" if most > 0 else ", or fewer"
    raise CacheTooLarge(
        f"{asked} ({max_tokens}) and prompts of up to {longest} tokens, {len(prompts)} at a time, take "
        f"{needed / _GIB:,.2f} GiB of keys and values on each rank, where {free / _GIB:,.2f} GiB are free; {remedy}"
    )


def free_memory(device: torch.device, local_size: int) -> int:
    """Bytes that every rank can still take: of the fullest GPU, or of the fullest host by the `local_size` ranks on it.
    Collective."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        memory = torch.cuda.mem_get_info(device)[0] + cached
    else:
        memory = psutil.virtual_memory().available // local_size
    least = torch.tensor(memory, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
