"""Averages gradients over ranks of one host: sent in their own type, added in the type that accumulates.

Shapes: P ranks of dp x cp, N elements of a parameter, C = ceil(N / P) elements of each rank's part; the last one may be
shorter, and some may be empty.

A reduce-scatter in fp32 needs fp32 gradients of all parts. Here each rank sends each part of its bf16 gradient to the
rank that keeps that part. The keeper adds the P parts in fp32 to what earlier micro-batches left there. This takes half
the bytes, no cast before and no pass after them, and the sum is as exact. Every rank sends to every other one, which
suits the links of a host.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor


def parts_of_all(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """For each flat gradient [N], this rank's part of every rank's: [P, n] with n <= C, this rank's own among them.

    The current stream waits for the messages, not the host.
    """
    return exchange_parts([_parts(gradient, group.size()) for gradient in gradients], group)


def exchange_parts(all_parts: Sequence[Sequence[Tensor]], group: dist.ProcessGroup) -> list[Tensor]:
    """For each gradient's parts, one [n] for each rank, what all ranks have for this one: [P, n], its own among them.

    The current stream waits for the messages, not the host.
    """
    rank, size = group.rank(), group.size()
    if size == 1:
        return [parts[0][None] for parts in all_parts]
    received = [parts[rank].new_empty((size, len(parts[rank]))) for parts in all_parts]
    messages = []
    for peer in range(size):
        if peer != rank:
            for parts, mine in zip(all_parts, received, strict=True):
                if len(parts[peer]):
                    messages.append(dist.P2POp(dist.isend, parts[peer], group=group, group_peer=peer))
                if mine.shape[1]:
                    messages.append(dist.P2POp(dist.irecv, mine[peer], group=group, group_peer=peer))
    torch._foreach_copy_([mine[rank] for mine in received], [parts[rank] for parts in all_parts])
    for message in dist.batch_isend_irecv(messages) if messages else []:
        message.wait()
    return received


def _parts(gradient: Tensor, size: int) -> list[Tensor]:
    """One for each rank."""
    length = -(-len(gradient) // size)
    return [gradient[min(rank * length, len(gradient)) :][:length] for rank in range(size)]


def add_mean(total: Tensor, parts: Tensor, *, first: bool) -> None:
    """Adds the mean of `parts` [P, n] over P to `total` [n], or makes it `total` where it is the first one.

    Added in the type of `total`, in order of ranks, so that all layouts of one size give the same sum.
    """
    kernels = _kernels(total)
    if kernels is not None:
        kernels.add_mean(total, parts, first=first)
        return
    mean = parts[0].to(total.dtype, copy=True)
    for part in parts[1:]:
        mean += part
    mean /= len(parts)
    total.copy_(mean) if first else total.add_(mean)


def _kernels(tensor: Tensor) -> ModuleType | None:
    if not tensor.is_cuda:
        return None
    from parallel import fused_triton  # Triton comes with torch's CUDA builds only

    return fused_triton
