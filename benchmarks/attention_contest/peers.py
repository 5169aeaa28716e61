"""Other libraries, each at the settings that suit it. One that is not installed fails when it is built, and says so.

On flash_attn_4 rows: torch's context_parallel over cuDNN, the fastest kernel it takes, for plain causal masks, and its
FlexAttention form for windows and documents. On flash_attn_2 rows: ring-flash-attn and yunchang, which call the same
flash-attn 2 as we do. Rows that a peer cannot compute are not offered to it: ring-flash-attn's rings pass a window to
every block unchanged and want each document's length divisible by 2P, so that windows and documents are left to its
all-gather (llama3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from attention_contest.contestants import Builder, Contestant, Stage
from attention_contest.rows import HEAD_DIM, RING_FLASH_ATTN, TORCH


def peers(stage: Stage) -> dict[str, Builder]:
    """By name; built only when their turn comes."""
    masked = bool(stage.row.window or stage.row.documents)
    if stage.kernel == "flash_attn_2":
        found = {
            f"{RING_FLASH_ATTN} llama3, {heads} KV heads at a time": partial(_llama3, stage, heads)
            for heads in sorted({1, stage.row.key_value_heads})
        }
        if masked:
            return found
        found[f"{RING_FLASH_ATTN} zigzag"] = partial(_ring_flash_attn, stage, "zigzag")
        found[f"{RING_FLASH_ATTN} stripe"] = partial(_ring_flash_attn, stage, "stripe")
        if stage.row.key_value_heads % stage.ranks == 0:
            found["yunchang, heads"] = partial(_yunchang, stage)
        return found
    if stage.kernel != "flash_attn_4":
        return {}
    if masked:
        return {f"{TORCH}, FlexAttention": partial(_flex, stage)}
    return {f"{TORCH} (cuDNN, {rotation})": partial(_torch, stage, rotation) for rotation in ("allgather", "alltoall")}


# -- ring-flash-attn and yunchang -----------------------------------------------------------------------------------


@cache
def _ring_flash_attn_package() -> Any:
    utilities: Any = import_module("transformers.modeling_flash_attention_utils")
    # ring-flash-attn 0.1.8 imports this name, which transformers 5 dropped, for an adapter that is not used here
    utilities.is_flash_attn_greater_or_equal_2_10 = lambda: True
    import ring_flash_attn

    return ring_flash_attn


def _ring_flash_attn(stage: Stage, which: str) -> Contestant:
    attend = getattr(_ring_flash_attn_package(), f"{which}_{'ring_' * (which == 'zigzag')}flash_attn_func")
    positions = stage.zigzag() if which == "zigzag" else stage.striped()
    return Contestant(positions, partial(attend, causal=True))


def _llama3(stage: Stage, heads_at_a_time: int) -> Contestant:
    package, window = _ring_flash_attn_package(), stage.row.window
    boundaries = torch.tensor(stage.row.boundaries(stage.ranks), dtype=torch.int32, device=stage.device)
    queries, keys, longest_q, longest_k, needed = package.llama3_flash_attn_prepare_cu_seqlens(
        boundaries, causal=True, rank=stage.rank, world_size=stage.ranks
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return package.llama3_flash_attn_varlen_func(
            q[0],
            k[0],
            v[0],
            queries,
            keys,
            longest_q,
            longest_k,
            heads_k_stride=heads_at_a_time,
            local_k_slice=needed,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
            group=dist.group.WORLD,
        )[None]

    return Contestant(stage.contiguous(), attend)


@cache
def _yunchang_layer(ranks: int) -> Any:
    import yunchang

    yunchang.set_seq_parallel_pg(ranks, 1, dist.get_rank(), ranks)
    return yunchang.LongContextAttention(ring_impl_type="basic")


def _yunchang(stage: Stage) -> Contestant:
    """Its other pure form, a ring over all ranks, is ring-flash-attn's."""
    return Contestant(stage.contiguous(), partial(_yunchang_layer(stage.ranks), causal=True))


# -- torch ----------------------------------------------------------------------------------------------------------


@cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(),))


def _torch(stage: Stage, rotation: str) -> Contestant:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        set_rotate_method(rotation)
        unused = torch.zeros(2 * stage.ranks, device=stage.device)  # it insists on something to shard
        with (
            context_parallel(_mesh(stage.device.type), buffers=[unused], buffer_seq_dims=[0]),
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        ):
            yield

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # repeating KV by hand was slower at every length
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return attended.transpose(1, 2)

    return Contestant(stage.zigzag(), attend, context)


def _flex(stage: Stage) -> Contestant:
    """All of the keys are gathered; documents are balanced by torch's own measure of a block's work, windows by
    zigzag. The block mask is made once, as the layers of a model would share it, and not timed."""
    from torch.distributed.tensor.experimental._context_parallel import (
        _attention as context_parallel,
    )
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
        _HeadTailLoadBalancer,
        _LoadBalancer,
        _PTRRLoadBalancer,
    )
    from torch.distributed.tensor.parallel import parallelize_module

    row, device, mesh = stage.row, stage.device, _mesh(stage.device.type)
    boundaries, inside = row.boundaries(stage.ranks), torch.arange(stage.length)
    balancer: _LoadBalancer = _HeadTailLoadBalancer(stage.length, stage.ranks, device.type)
    if row.documents:
        balancer = _PTRRLoadBalancer(block_mask(inside, inside, boundaries, stage.window, device), stage.ranks)
    order = balancer._generate_indices(restore=False)[0].cpu()
    positions = order.view(stage.ranks, -1)[stage.rank]
    mask = block_mask(positions, order, boundaries, stage.window, device)
    flex_attention = _flex_attention()

    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            grouped = query.shape[1] != key.shape[1]
            return flex_attention(query, key, value, block_mask=mask, scale=HEAD_DIM**-0.5, enable_gqa=grouped)

    style = context_parallel._ContextParallel(
        seq_dim=2, attention_type=context_parallel._ContextParallel.AttentionType.FLEX
    )
    layer = parallelize_module(Attention(), mesh, style)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

    return Contestant(positions, attend)


@cache
def _flex_attention() -> Any:
    """Compiled once for each shape, with and without gradients: masks differ in the tensors that they read."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # as many forms of one function as there are shapes
    return torch.compile(flex_attention, dynamic=False)


def block_mask(
    queries: Tensor, keys: Tensor, boundaries: Sequence[int], window: int | None, device: torch.device
) -> Any:
    """FlexAttention's mask of the queries and keys at these positions, whole blocks of neighbours each, any order.

    `create_block_mask` looks at every pair: 4 GiB at 65,536 tokens, or a compilation for each shape and rank. But an
    earlier block of keys is seen from a block of queries where the nearest pair is, the first query and the last key,
    and wholly where the farthest is.
    """
    from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE, BlockMask

    starts = torch.tensor(boundaries)
    lowest = starts[torch.searchsorted(starts, queries, right=True) - 1]
    if window is not None:
        lowest = torch.maximum(lowest, queries - window + 1)
    size = _DEFAULT_SPARSE_BLOCK_SIZE
    first, last = queries.view(-1, size)[:, :1], queries.view(-1, size)[:, -1:]
    low, high = lowest.view(-1, size)[:, :1], lowest.view(-1, size)[:, -1:]
    first_key, last_key = keys.view(-1, size)[:, 0], keys.view(-1, size)[:, -1]
    assert torch.equal(last - first, torch.full_like(first, size - 1)), "blocks of queries are neighbours"
    assert torch.equal(last_key - first_key, torch.full_like(first_key, size - 1)), "blocks of keys are neighbours"
    some = (first_key <= last) & (last_key >= low)
    every = (last_key <= first) & (first_key >= high)
    at, lowest, place = (tensor.to(device, torch.int32) for tensor in (queries, lowest, keys))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (place[key] <= at[query]) & (place[key] >= lowest[query])

    listed = []
    for blocks in (some & ~every, every):
        counts, indices = blocks.sum(1), blocks.int().argsort(dim=1, descending=True, stable=True)
        listed += [tensor[None, None].to(device, torch.int32) for tensor in (counts, indices)]
    lengths = len(queries), len(keys)
    return BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=lengths)
