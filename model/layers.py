"""Norm and the feed-forward layer.

Shapes: B batch, S sequence, E hidden_size, F intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv:1910.07467), [..., size] -> [..., size]; statistics
    in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)). [B, S, E] -> [B, S, E].

    With `tile_tokens` that many tokens are computed at a time, again in the backward pass: of its four inner tensors
    [tokens, F] only one tile's ever exist (the sequence tiling of ALST, arXiv:2506.13996, section 3.3).
    """

    def __init__(self, config: ModelConfig, *, tile_tokens: int | None = None):
        super().__init__()
        self.tile_tokens = tile_tokens
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        if self.tile_tokens is None or len(tokens) <= self.tile_tokens:
            return self._swiglu(hidden)
        tiles = [checkpoint(self._swiglu, tile, use_reentrant=False) for tile in tokens.split(self.tile_tokens)]
        return torch.cat(tiles).view(hidden.shape)

    def _swiglu(self, hidden: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
