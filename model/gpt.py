"""A Llama-family GPT for one device, top to bottom.

Shapes: B batch, S sequence, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.attention import Attention, AttentionFunction
from model.config import ModelConfig
from model.head import Head
from model.kernels import Documents
from model.layers import FeedForward, RMSNorm
from model.recompute import Recompute, Store, recomputed
from model.rope import rotary_tables


class Block(nn.Module):
    """Pre-norm transformer block. [B, S, E] -> [B, S, E]."""

    def __init__(
        self,
        config: ModelConfig,
        attend: AttentionFunction,
        *,
        recompute: Recompute = "none",
        mlp_tile_tokens: int | None = None,
        store: Store | None = None,
    ):
        super().__init__()
        self.recompute, self.store = recompute, store
        # A plain function, called with the block: `GPT.compile_blocks` puts one that all blocks share in its place.
        self.run = Block.under_policy
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, attend)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config, tile_tokens=mlp_tile_tokens)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents | None) -> Tensor:
        if self.store is None or not (self.training and torch.is_grad_enabled()):
            return self.run(self, hidden, rotary, documents)
        with self.store.block(hidden):
            return self.run(self, hidden, rotary, documents)

    def under_policy(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents | None) -> Tensor:
        """The block, which computes again what its policy says: what is compiled, if anything is."""
        compute = recomputed(self._compute, self.recompute if self.training else "none", self.store)
        return compute(hidden, rotary, documents)

    def _compute(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents | None) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, documents)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class GPT(nn.Module):
    """Decoder-only language model. Build it under `torch.device("meta")` and fill its weights afterwards
    (`initial_distribution` says with what)."""

    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": "vocab_embedding",
        "layers.*.attention_norm": "region_input",
        "layers.*.attention": "region_output",
        "layers.*.attention.[qkv]_proj": "column",
        "layers.*.attention.[qk]_norm": "partial_grad",
        "layers.*.attention.o_proj": "row",
        "layers.*.feed_forward_norm": "region_input",
        "layers.*.feed_forward": "region_output",
        "layers.*.feed_forward.gate_proj": "column",
        "layers.*.feed_forward.up_proj": "column",
        "layers.*.feed_forward.down_proj": "row",
        "norm": "region_input",
        "lm_head": "vocab_head",
    }
    """How each module splits by heads, features or vocabulary: plain data, applied elsewhere. A region begins behind a
    norm and ends before the residual sum; within it a rank has all tokens and a share of the heads or features."""

    def __init__(
        self,
        config: ModelConfig,
        attention: Sequence[AttentionFunction],
        *,
        recompute: Recompute | Sequence[Recompute] = "none",
        mlp_tile_tokens: int | None = None,
        store: Store | None = None,
    ):
        """`attention`: how each block attends. `recompute`: one policy for all blocks, or one for each. `store`: where
        blocks put what they keep for the backward pass, if not on the device. `mlp_tile_tokens`: see FeedForward."""
        super().__init__()
        self.config = config
        policies = [recompute] * config.num_hidden_layers if isinstance(recompute, str) else recompute
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, attend, recompute=policy, mlp_tile_tokens=mlp_tile_tokens, store=store)
            for attend, policy in zip(attention, policies, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            assert isinstance(self.embed_tokens.weight, nn.Parameter)
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Token ids, their positions and (already shifted) labels, all [B, S] -> (loss_sum, token_count).

        Without labels: the logits [B, S, V]. Tokens attend within their document where `documents` are given.
        """
        hidden = self.embed_tokens(input_ids)
        rotary = rotary_tables(position_ids, self.config, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotary, documents)
        return self.lm_head(self.norm(hidden), labels)

    def compile_blocks(self) -> None:
        """Compiles the blocks, one function for all of them so that it is compiled once, and the head's softmax.

        Their `forward` stays plain, and with it whatever is hooked to the call of a block.
        """
        self.lm_head.compiled = True
        compiled = torch.compile(Block.under_policy, fullgraph=True)
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.run = compiled

    def initial_distribution(self, name: str) -> tuple[float, float]:
        """(mean, standard deviation) of the parameter `name` before training: norms 1, biases 0, matrices normal."""
        if name.endswith("norm.weight"):
            return 1.0, 0.0
        if name.endswith(".bias"):
            return 0.0, 0.0
        std = self.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        return 0.0, std
