"""Small GPTs of every kind, and a batch for them.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from model.attention import kernel_attention
from model.config import ModelConfig, RopeScaling
from model.gpt import GPT
from model.kernels import KERNELS, Documents

B, S = 2, 12
DOCUMENT_LENGTHS = (1, 7, 4, 5, 1, 1, 5)  # two rows of 12
LLAMA_3 = RopeScaling(factor=8.0, original_sequence_length=8192)


def config_of(**changes: Any) -> ModelConfig:
    values = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**(values | changes))


def build(config: ModelConfig, kernel: str = "math", dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    """A GPT whose weights, norms included, are far from any special value."""
    model = GPT(config, kernel_attention(KERNELS[kernel], config), **options).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model


def batch(packed: bool, vocab_size: int = 31) -> dict[str, Any]:
    """Inputs of `GPT.forward`; packed documents restart their positions. A few labels carry no loss."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(vocab_size, (B, S), generator=generator)
    labels = torch.randint(vocab_size, (B, S), generator=generator)
    labels[0, 3], labels[1, -1] = -100, -100
    lengths = DOCUMENT_LENGTHS if packed else (S,) * B
    positions = torch.tensor([position for length in lengths for position in range(length)]).view(B, S)
    documents = Documents.from_boundaries([0, *accumulate(lengths)], "cpu") if packed else None
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels, "documents": documents}


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "gqa": ({}, False),
    "mha": ({"num_key_value_heads": 4}, False),
    "mqa": ({"num_key_value_heads": 1}, False),
    "qk_norm": ({"qk_norm": True}, False),
    "tied": ({"tie_word_embeddings": True}, False),
    "window": ({"sliding_window": 3}, False),
    "window of one": ({"sliding_window": 1}, False),
    "window past the sequence": ({"sliding_window": 40}, False),
    "window in one block": ({"sliding_window": 3, "full_attention_layers": (1,)}, False),
    "documents": ({}, True),
    "documents, window": ({"sliding_window": 3}, True),
    "bias of queries, keys and values": ({"attention_bias": "qkv"}, False),
    "bias everywhere, QK-norm": ({"attention_bias": "all", "qk_norm": True}, False),
    "linear scaling": ({"rope_scaling": RopeScaling(kind="linear", factor=3.0)}, False),
    "yarn": (
        {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_sequence_length=256), "rope_theta": 900.0},
        False,
    ),
    "yarn, its factor given": (
        {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_sequence_length=256, attention_factor=1.3)},
        False,
    ),
    "yarn, its ramp from the second pair to beyond the last": (
        {
            "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_sequence_length=4096, beta_fast=320.0),
            "rope_theta": 10.0,
        },
        False,
    ),
    "rope scaling": ({"rope_scaling": RopeScaling(factor=4.0, original_sequence_length=16), "rope_theta": 90.0}, False),
    "all at once": (
        {
            "qk_norm": True,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "rope_theta": 70.0,
            "rope_scaling": RopeScaling(factor=2.0, original_sequence_length=20),
            "rms_norm_eps": 0.02,
            "num_key_value_heads": 1,
        },
        True,
    ),
}
