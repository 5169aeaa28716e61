"""Backend `math`: the definition of attention in plain torch, for every mask, dtype and device.

It materialises the whole [B, H, Sq, Sk] score matrix, so it serves as reference and as last resort, not for long
sequences. Half precision is computed in fp32 and rounded once, at the end.

Shapes: B batch, Sq queries, Sk keys, K key/value heads, G query heads of each, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.mask import AttentionMask, Documents
from model.kernels.protocol import AttentionKernel, Capabilities, Gradients, Targets


class MathKernel(AttentionKernel):
    """Attention as it is written (Attention Is All You Need, section 3.2.1; GQA, Ainslie et al. 2023)."""

    name = "math"
    capabilities = Capabilities(
        device_types=("cpu", "cuda"), dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )

    def availability(self) -> None:
        return None

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        del out  # the product makes its own and rounds it: copied by the caller
        dtype = q.dtype
        q, k, v = (_widened(x) for x in (q, k, v))
        scores = _scores(_grouped(q, k.shape[2]), k, scale, mask)
        lse = scores.logsumexp(-1)
        result = torch.einsum("bhgqk,bkhd->bqhgd", _probabilities(scores, lse), v)
        return result.flatten(2, 3).to(dtype), lse.flatten(1, 2)

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        mask: AttentionMask,
        deterministic: bool,
        targets: Targets,
    ) -> Gradients:
        del deterministic, targets  # batched products have no atomics; results are copied by the caller
        dtype, kv_heads = q.dtype, k.shape[2]
        dout, q, k, v, out = (_widened(x) for x in (dout, q, k, v, out))
        q, dout, out = (_grouped(x, kv_heads) for x in (q, dout, out))
        probabilities = _probabilities(_scores(q, k, scale, mask), lse.unflatten(1, (kv_heads, -1)))
        dv = torch.einsum("bhgqk,bqhgd->bkhd", probabilities, dout)
        # d softmax: P * (dP - rowsum(P * dP)); over the whole set of keys rowsum(P * dP) is dout . out.
        row_sum = (dout * out).sum(-1).permute(0, 2, 3, 1)[..., None]
        dscores = probabilities * (torch.einsum("bqhgd,bkhd->bhgqk", dout, v) - row_sum) * scale
        dq = torch.einsum("bhgqk,bkhd->bqhgd", dscores, k)
        dk = torch.einsum("bhgqk,bqhgd->bkhd", dscores, q)
        return dq.flatten(2, 3).to(dtype), dk.to(dtype), dv.to(dtype)


def visible_pairs(mask: AttentionMask, batch: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Booleans that broadcast to [B, K, G, Sq, Sk], True where query i sees key j; None if all see all."""
    distance = torch.arange(queries, device=device)[:, None] + mask.offset - torch.arange(keys, device=device)
    visible = None
    if mask.packing is not None:
        visible, distance = _within_documents(*mask.packing, batch, queries, keys)
    if mask.causal:
        behind = distance >= 0
        visible = behind if visible is None else visible & behind
    if mask.window is not None:
        within = distance < mask.window
        visible = within if visible is None else visible & within
    return visible


def _within_documents(
    documents: Documents, key_documents: Documents, batch: int, queries: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Whether query and key share a document, and how far the key is behind the query; [B, 1, 1, Sq, Sk] both."""
    starts, key_starts = documents.cu_seqlens, key_documents.cu_seqlens
    positions = torch.arange(batch * queries, device=starts.device, dtype=torch.int32)
    key_positions = torch.arange(batch * keys, device=starts.device, dtype=torch.int32)
    document = torch.searchsorted(starts, positions, right=True) - 1
    key_document = torch.searchsorted(key_starts, key_positions, right=True) - 1
    # A document's last query stands at its last key: in the keys' numbering that moves all its queries alike.
    positions = positions + (key_starts - starts)[1:][document]
    rows, columns = (batch, 1, 1, queries, 1), (batch, 1, 1, 1, keys)
    return document.view(rows) == key_document.view(columns), positions.view(rows) - key_positions.view(columns)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Sq, H, D] -> [B, Sq, K, G, D]: query heads beside the key/value head they share."""
    return x.unflatten(2, (kv_heads, -1))


def _scores(q: Tensor, k: Tensor, scale: float, mask: AttentionMask) -> Tensor:
    """[B, K, G, Sq, Sk], -inf where masked."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k) * scale
    visible = visible_pairs(mask, q.shape[0], q.shape[1], k.shape[1], q.device)
    return scores if visible is None else scores.masked_fill_(~visible, float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # In an empty row both are -inf and their difference is nan; against 0 the exponential is the 0 we want.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
