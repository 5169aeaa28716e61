"""The network's shape: the `model` section of a job file, and the only argument a GPT is built from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Backend = Literal["auto", "flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch_flash", "cpu", "math"]


class RopeScaling(BaseModel):
    """Llama-3's frequency scaling (The Llama 3 Herd of Models, section 3.2; the numbers of its `config.json`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    factor: float = Field(gt=1.0)
    """Wavelengths longer than the original context are stretched by this much."""
    low_frequency_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above original_sequence_length / low_frequency_factor are stretched in full."""
    high_frequency_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below original_sequence_length / high_frequency_factor are left alone."""
    original_sequence_length: int = Field(default=8192, gt=0)
    """Tokens of context that the unscaled frequencies were trained on."""

    @model_validator(mode="after")
    def _frequencies_in_order(self) -> Self:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor ({self.high_frequency_factor}) must be greater than low_frequency_factor "
                f"({self.low_frequency_factor}); Llama 3 uses 4.0 and 1.0"
            )
        return self


class ModelConfig(BaseModel):
    """A Llama-family decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    vocab_size: int = Field(gt=0)
    """Rows of the embedding; a tokenizer may use fewer. Padding for tensor parallelism comes on top, never stored."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    intermediate_size: int = Field(gt=0)
    """Width of the SwiGLU's two inner projections."""
    num_hidden_layers: int = Field(gt=0)
    """Transformer blocks."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_key_value_heads: int = Field(gt=0)
    """Key and value heads: equal to the query heads for MHA, 1 for MQA, between for GQA."""
    head_dim: int = Field(default=0, ge=0)
    """Width of one head; 0 takes hidden_size / num_attention_heads."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square inside every RMSNorm."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies (RoFormer, section 3.2.2); Llama 3 uses 500000."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 frequency scaling; omit for plain RoPE."""
    tie_word_embeddings: bool = False
    """Share the embedding's weight with the head's."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys before RoPE."""
    sliding_window: int | None = Field(default=None, gt=0)
    """A token sees itself and the sliding_window - 1 tokens before it; omit for full causal attention."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of every initial matrix; those that write to the residual stream are scaled by
    1 / sqrt(2 * num_hidden_layers) (GPT-2, section 2.3)."""
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
