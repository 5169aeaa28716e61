"""Grouped-query attention around a seam: anything that maps (q, k, v, documents) to outputs can attend.

Shapes: B batch, S sequence, E hidden_size, H query heads, K key/value heads, D head_dim. Heads are counted with -1, so
the same module runs on all heads or on one rank's share of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import AttentionKernel, Documents, KernelOperator
from model.layers import RMSNorm
from model.rope import rotate

AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Documents | None"], Tensor]
"""(q [B, S, H, D], k and v [B, S, K, D], documents) -> [B, S, H, D]: causal self-attention, windowed if configured."""


def attention_of_blocks(
    config: ModelConfig, attention: Callable[[int | None], AttentionFunction]
) -> list[AttentionFunction]:
    """The function of each block: `attention(window)`, called once for every window that blocks have."""
    made = {window: attention(window) for window in dict.fromkeys(config.windows)}
    return [made[window] for window in config.windows]


def kernel_attention(
    kernel: AttentionKernel, config: ModelConfig, *, deterministic: bool = False
) -> list[AttentionFunction]:
    """The seam's plain side, for each block: the whole sequence on one device."""
    scale = config.head_dim**-0.5
    return attention_of_blocks(
        config, lambda window: KernelOperator(kernel, scale=scale, window=window, deterministic=deterministic)
    )


class Attention(nn.Module):
    """GQA (arXiv:2305.13245) with RoPE and optional QK-norm. KV heads are never repeated here."""

    def __init__(self, config: ModelConfig, attend: AttentionFunction):
        super().__init__()
        self.head_dim, self.attend = config.head_dim, attend
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        bias, output_bias = config.attention_bias != "none", config.attention_bias == "all"
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents | None) -> Tensor:
        """[B, S, E] -> [B, S, E]; `rotary` as `model.rope.rotary_tables` makes it."""
        q = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        # Under autocast norm and rotation compute in fp32; a kernel wants one dtype.
        q, k = rotate(self.q_norm(q), rotary).to(v.dtype), rotate(self.k_norm(k), rotary).to(v.dtype)
        return self.o_proj(self.attend(q, k, v, documents).flatten(-2))
