"""The copies and sums around an attention kernel, each in one launch: by Triton on GPUs, by torch elsewhere.

At a few thousand tokens the host, not the GPU, limits the speed, and every torch operation costs it tens of
microseconds. Each function here is written in torch. On GPUs `parallel.fused_triton` does the same, bit for bit.

Shapes: B batch, L local tokens, H query heads, K key/value heads, D head_dim; M length of a buffer of keys; U ranks
that trade heads, T = U x L tokens of theirs, w heads of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

Share = tuple[slice, Tensor]
"""Positions, and [their number, 2, B, K, D] gradients of the keys and values there."""
Range = tuple[int, int, int]
"""Local index, index in a buffer, length."""


@dataclass(frozen=True)
class Heads:
    """Some heads of every rank: of `tensor` [B, L, U x per rank, D], `count` from `first` on among each rank's own."""

    tensor: Tensor
    first: int
    count: int

    def of(self, rank: int, size: int) -> Tensor:
        """Those of one rank of `size`: [B, L, count, D]."""
        return self.tensor.narrow(2, rank * (self.tensor.shape[2] // size) + self.first, self.count)


def pack_keys(
    k: Tensor, v: Tensor, slot: Tensor, buffer: Tensor, own: Sequence[Range], again: Range | None = None
) -> None:
    """Lays k and v [B, L, K, D] side by side: all in `slot` [L, 2, B, K, D], and in `buffer` [M, 2, B, K, D] the
    `own` ranges, of which there are one or two, one after the other, and once more the range `again`."""
    kernels = _kernels(k, v)
    if kernels is not None:
        kernels.pack_keys(k, v, slot, buffer, own, again)
        return
    torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1, out=slot)
    for local, index, length in (*own, *([again] if again else [])):
        buffer[index : index + length].copy_(slot[local : local + length])


def add_shares(dk: Tensor, dv: Tensor, shares: Sequence[Share]) -> None:
    """Writes the sums of `shares` into dk and dv [B, n, K, D]: added in fp32 (fp64 for fp64), in order, rounded once.
    They cover all of 0 to n together, or leave 0."""
    kernels = _kernels(dk, dv)
    if kernels is not None and len(shares) <= kernels.MOST_SHARES and dk.dtype != torch.float64:
        kernels.add_shares(dk, dv, shares)
        return
    wide = torch.promote_types(dk.dtype, torch.float32)
    total = torch.zeros(dk.shape[1], *shares[0][1].shape[1:], dtype=wide, device=dk.device)
    for where, share in shares:
        total[where] += share
    dk.copy_(total[:, 0].transpose(0, 1))
    dv.copy_(total[:, 1].transpose(0, 1))


def pack_heads(parts: Sequence[Heads], slot: Tensor, whole: Tensor, rank: int, own: Sequence[slice]) -> None:
    """Lays the heads of `parts` side by side: those of peers in `slot` [U, L, B, w, D], by rank, and those of `rank` in
    `whole` [T, B, w, D], at the one or two ranges `own` of its tokens."""
    kernels = _kernels(*(part.tensor for part in parts))
    if kernels is not None:
        kernels.pack_heads(parts, slot, whole, rank, own)
        return
    start = 0
    for part in parts:
        heads = slice(start, start + part.count)
        for peer, theirs in enumerate(slot):
            if peer != rank:
                theirs[:, :, heads] = part.of(peer, len(slot)).transpose(0, 1)
        local, mine = 0, part.of(rank, len(slot)).transpose(0, 1)
        for tokens in own:
            length = tokens.stop - tokens.start
            whole[tokens, :, heads] = mine[local : local + length]
            local += length
        start += part.count


def unpack_heads(parts: Sequence[Heads], whole: Tensor, own: Sequence[slice], rank: int, size: int) -> None:
    """Writes the heads of `rank`, one of `size`, to `parts`: they lie side by side in `whole` [T, B, w, D], where this
    rank's tokens are the one or two ranges `own`."""
    kernels = _kernels(*(part.tensor for part in parts))
    if kernels is not None:
        kernels.unpack_heads(parts, whole, own, rank, size)
        return
    start = 0
    for part in parts:
        target, local = part.of(rank, size).transpose(0, 1), 0
        for tokens in own:
            length = tokens.stop - tokens.start
            target[local : local + length] = whole[tokens, :, start : start + part.count]
            local += length
        start += part.count


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """Triton's form of these functions, where it can read and write such tensors [B, n, heads, D]."""
    for tensor in tensors:
        if not tensor.is_cuda or tensor.stride(3) != 1 or tensor.stride(2) != tensor.shape[3]:
            return None
    from parallel import fused_triton  # Triton comes with torch's CUDA builds only

    return fused_triton
