"""Counts a model's parameters from its shape."""

from __future__ import annotations

from model.config import ModelConfig
from parallel.vocab import padded_vocabulary


def count_parameters(model: ModelConfig, tensor_parallel_size: int = 1) -> int:
    """Elements on one tensor-parallel rank, vocabulary padding included; with 1, the whole model's.

    `tensor_parallel_size` must divide the heads and intermediate_size.
    """
    vocabulary = padded_vocabulary(model.vocab_size, tensor_parallel_size) // tensor_parallel_size
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) // tensor_parallel_size
    projections = model.hidden_size * heads * model.head_dim
    feed_forward = 3 * model.hidden_size * (model.intermediate_size // tensor_parallel_size)
    biases = 0
    if model.attention_bias != "none":
        biases = (model.num_attention_heads + 2 * model.num_key_value_heads) // tensor_parallel_size * model.head_dim
    if model.attention_bias == "all":
        biases += model.hidden_size
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    tables = vocabulary * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return tables + model.num_hidden_layers * (projections + biases + feed_forward + norms) + model.hidden_size
