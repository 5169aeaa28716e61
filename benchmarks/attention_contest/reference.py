"""Attention and its gradients in fp32 for a few queries of a long sequence, which is what errors are measured against.

Shapes: S tokens, N sampled queries, H query heads, K key/value heads, D head_dim.

If the output's gradient is zero but at N queries, dQ is zero but there, and dK and dV, of all S keys, come from these
queries alone: their rows of the score matrix, [N, S] a head, are all that is computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")


def sampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None,
    boundaries: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and dq [N, H, D] of the queries at `positions` [N], dk and dv [S, K, D].

    Args:
        q, dout: [N, H, D], the sampled queries and the gradients of their outputs.
        k, v: [S, K, D].
        boundaries: of the documents, 0 to S.
    """
    length, kv_heads, _ = k.shape
    groups = q.shape[1] // kv_heads
    lowest = torch.tensor([boundaries[bisect_right(boundaries, int(at)) - 1] for at in positions])
    if window is not None:
        lowest = torch.maximum(lowest, positions.cpu() - window + 1)
    keys = torch.arange(length, device=k.device)
    visible = (keys >= lowest.to(k.device)[:, None]) & (keys <= positions.to(k.device)[:, None])
    hidden = ~visible.repeat_interleave(groups, dim=0)
    out, dq, dk, dv = (torch.empty_like(like, dtype=torch.float32) for like in (q, q, k, v))
    for head in range(kv_heads):
        of_head = slice(head * groups, (head + 1) * groups)
        queries, gradient = (tensor[:, of_head].reshape(-1, q.shape[2]).float() for tensor in (q, dout))
        keys_of_head, values = k[:, head].float(), v[:, head].float()
        weights = (scale * queries @ keys_of_head.T).masked_fill_(hidden, -torch.inf).softmax(dim=1)
        attended = weights @ values
        dv[:, head] = weights.T @ gradient
        slope = weights * (gradient @ values.T - (gradient * attended).sum(1, keepdim=True))
        dk[:, head] = scale * slope.T @ queries
        out[:, of_head] = attended.view(-1, groups, q.shape[2])
        dq[:, of_head] = (scale * slope @ keys_of_head).view(-1, groups, q.shape[2])
    return out, dq, dk, dv
