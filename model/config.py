"""The network's shape: the `model` section of a job file, and the only argument a GPT is built from."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Backend = Literal["auto", "flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch_flash", "cpu", "math"]


class RopeScaling(BaseModel):
    """Rotary frequencies stretched past the context they were trained on. Keys of another kind keep their defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    kind: Literal["linear", "llama3", "yarn"] = "llama3"
    """linear: all wavelengths alike (Position Interpolation, arXiv:2306.15595). llama3: long ones only (The Llama 3
    Herd of Models, section 3.2). yarn: those that turn little within the original context (arXiv:2309.00071)."""
    factor: float = Field(gt=1.0)
    """Wavelengths are stretched by this much."""
    original_sequence_length: int = Field(default=8192, gt=0)
    """llama3, yarn: tokens of context that the unscaled frequencies were trained on."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """llama3: wavelengths above original_sequence_length / low_frequency_factor are stretched in full."""
    high_frequency_factor: float = Field(default=4.0, gt=0)
    """llama3: wavelengths below original_sequence_length / high_frequency_factor are left alone."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: pairs that turn more often than this within the original context are left alone."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: pairs that turn less often than this are stretched in full."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn: multiplies rotated queries and keys; omit for the paper's 0.1 ln(factor) + 1."""

    @property
    def yarn_magnitude(self) -> float:
        """What yarn multiplies rotated queries and keys by (arXiv:2309.00071, section 3.4)."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    @model_validator(mode="after")
    def _keys_are_of_this_kind(self) -> Self:
        for key, kinds in _SCALING_KEYS.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} ({getattr(self, key)}) belongs to kind {' and '.join(kinds)}, not {self.kind}")
        return self

    @model_validator(mode="after")
    def _frequencies_in_order(self) -> Self:
        for low, high, usual in (
            ("low_frequency_factor", "high_frequency_factor", "Llama 3 uses 4.0 and 1.0"),
            ("beta_slow", "beta_fast", "YaRN uses 32.0 and 1.0"),
        ):
            if getattr(self, high) <= getattr(self, low):
                raise ValueError(
                    f"{high} ({getattr(self, high)}) must be greater than {low} ({getattr(self, low)}); {usual}"
                )
        return self


_SCALING_KEYS = {
    "original_sequence_length": ("llama3", "yarn"),
    "low_frequency_factor": ("llama3",),
    "high_frequency_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn",),
}
"""Which kinds of scaling read a key."""


class ModelConfig(BaseModel):
    """A Llama-family decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    vocab_size: int = Field(gt=0, le=100_000_000)
    """Rows of the embedding; a tokenizer may use fewer. Padding for tensor parallelism is added to this and never
    stored."""
    hidden_size: int = Field(gt=0, le=100_000_000)
    """Width of the residual stream."""
    intermediate_size: int = Field(gt=0, le=100_000_000)
    """Width of the SwiGLU's two inner projections."""
    num_hidden_layers: int = Field(gt=0, le=10_000)
    """Transformer blocks."""
    num_attention_heads: int = Field(gt=0, le=1_000_000)
    """Query heads."""
    num_key_value_heads: int = Field(gt=0, le=1_000_000)
    """Key and value heads: equal to the query heads for MHA, 1 for MQA, between for GQA."""
    head_dim: int = Field(default=0, ge=0, le=10_000)
    """Width of one head; 0 takes hidden_size / num_attention_heads."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square inside every RMSNorm."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies (RoFormer, section 3.2.2); Llama 3 uses 500000."""
    rope_scaling: RopeScaling | None = None
    """Frequencies for a longer context than the weights were trained on; omit for plain RoPE."""
    tie_word_embeddings: bool = False
    """Share the embedding's weight with the head's."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys before RoPE."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of the attention projections: none (Llama, Mistral, Qwen3), those of queries, keys and values (Qwen2), or
    the output's too."""
    sliding_window: int | None = Field(default=None, gt=0)
    """A token sees itself and the sliding_window - 1 tokens before it; omit for full causal attention."""
    full_attention_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    """Blocks, counted from 0, in which a token sees all tokens before it in spite of sliding_window: every sixth block
    of 18 (as in Gemma 3) is [5, 11, 17]."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of every initial matrix; those that write to the residual stream are scaled by
    1 / sqrt(2 * num_hidden_layers) (GPT-2, section 2.3). Weights of init_from stay what they are."""
    init_from: str | None = Field(default=None, min_length=1)
    """Folder of the weights to start from: a converted model (`launch/convert.py from-hf`) or another run. Keys of this
    section that you leave out are taken from there. Omit it to start from random weights."""
    attention_backend: Backend = "auto"
    """Attention kernel; auto takes the fastest that is installed and allowed."""

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, data: object) -> object:
        if isinstance(data, dict) and not data.get("head_dim"):
            hidden, heads = data.get("hidden_size"), data.get("num_attention_heads")
            if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
                return data | {"head_dim": hidden // heads}
        return data

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim == 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}), or head_dim must be given"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads}); valid here: {', '.join(map(str, divisors))}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        return self

    @model_validator(mode="after")
    def _full_attention_is_of_blocks_that_exist(self) -> Self:
        beyond = [number for number in self.full_attention_layers if number >= self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"full_attention_layers names block {beyond[0]}, but with num_hidden_layers ({self.num_hidden_layers}) "
                f"the last is {self.num_hidden_layers - 1}: blocks are counted from 0"
            )
        return self

    @property
    def windows(self) -> list[int | None]:
        """How many tokens a token sees in each block, itself among them; None: all up to itself."""
        full = set(self.full_attention_layers)
        return [None if number in full else self.sliding_window for number in range(self.num_hidden_layers)]

    @property
    def widest_window(self) -> int | None:
        """How many tokens a token sees in the blocks where it sees most; None: all up to itself."""
        return None if self.full_attention_layers else self.sliding_window


SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "qk_norm",
    "attention_bias",
)
"""Keys that decide which parameters there are and of which shapes: weights fit a model that has these in common."""

JOB_KEYS = frozenset({"init_from", "attention_backend"})
"""Keys that say where the weights began and how they are computed with, not what the network is."""
