"""The network's keys."""

from __future__ import annotations

from typing import Any

from launch.weights.stored_model import parameter_shapes
from model.config import SHAPE_KEYS, ModelConfig
from tests.unit.transformers_models import V


def test_shape_keys_are_those_that_change_parameters() -> None:
    base: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    others: dict[str, Any] = {
        "head_dim": 16,
        "tie_word_embeddings": True,
        "qk_norm": True,
        "attention_bias": "qkv",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5.0,
        "rope_scaling": {"factor": 2.0},
        "sliding_window": 3,
        "full_attention_layers": [1],
        "initializer_range": 0.1,
        "init_from": "somewhere",
        "attention_backend": "math",
    }
    changes = {key: value * 2 for key, value in base.items()} | others
    assert changes.keys() == ModelConfig.model_fields.keys(), "every key is tried"
    shapes = parameter_shapes(ModelConfig(**base))
    for key, value in changes.items():
        changed = parameter_shapes(ModelConfig.model_validate(base | {"num_key_value_heads": 2} | {key: value}))
        assert (changed != shapes) == (key in SHAPE_KEYS), key
