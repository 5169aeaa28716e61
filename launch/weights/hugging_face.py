"""Hugging Face families that are the same network as ours: their config.json and their parameter names.

Weights only need renaming: the families keep queries, keys and values apart, and rotate pairs (d, d + D/2), as we do.
What a family has and we have not is refused by name. Keys of transformers 4 (rope_theta, rope_scaling) and 5
(rope_parameters) are read. Those of 4 are written, which 5 and other programs read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig, RopeScaling

Config = Mapping[str, Any]
"""A config.json."""

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> the class that transformers loads it with."""

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside config.json and the weights that a model is used with: the tokenizer's, and how to generate."""

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
}
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)


class UnsupportedModel(ValueError):
    """A model that one side has and the other cannot express; the message names the key."""


def their_name(name: str) -> str:
    """Our parameter name -> theirs, the same in every family."""
    block = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.+)", name)
    if block:
        number, part, rest = block.groups()
        return f"model.layers.{number}.{_BLOCK_NAMES[part]}.{rest}"
    return name if name.startswith("lm_head.") else f"model.{name}"


def model_from(config: Config) -> ModelConfig:
    """The network that a config.json describes.

    Raises UnsupportedModel where it is not one of the families, or uses what our model has not.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"model_type {family!r} (architectures {config.get('architectures')}) is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    _refuse_what_we_have_not(config)
    keys = {key: config[key] for key in _SAME_NAME if config.get(key) is not None}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if key not in keys:
            raise UnsupportedModel(f"config.json has no {key}; it is not complete, download it again")
    keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
    keys.setdefault("rms_norm_eps", 1e-6)
    try:
        theta, scaling = _rope(config)
    except UnsupportedModel:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"config.json's RoPE keys cannot be read ({error!r}); download it again") from None
    biased = family == "qwen2" or bool(config.get("attention_bias", False))
    keys |= {"rope_theta": theta, "rope_scaling": scaling, "qk_norm": family == "qwen3"}
    keys["attention_bias"] = "none" if not biased else "qkv" if family == "qwen2" else "all"
    try:
        ModelConfig(**keys)  # first: the blocks are counted through for their windows
        window, full_attention_layers = _windows(config)
        return ModelConfig(**keys, sliding_window=window, full_attention_layers=full_attention_layers)
    except TypeError as error:
        raise UnsupportedModel(f"config.json's window keys cannot be read ({error!r}); download it again") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise UnsupportedModel(f"config.json describes no model that can be built: {faults}") from None


def config_for(model: ModelConfig, *, max_position_embeddings: int, dtype: str, source: Config | None = None) -> dict:
    """A config.json for `model`; `source` is the one it was converted from, whose family and token ids are kept.

    dtype: "float32", "bfloat16" or "float16". Raises UnsupportedModel where no family has the model's combination.
    """
    family = _family(model, source)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{key: getattr(model, key) for key in _SAME_NAME},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling_for(model.rope_scaling),
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family in ("llama", "qwen3"):
        config["attention_bias"] = model.attention_bias == "all"
    if family == "llama":
        config["mlp_bias"] = False
    if family == "mistral":
        config["sliding_window"] = model.sliding_window
    if family in ("qwen2", "qwen3"):
        windowed = [window is not None for window in model.windows]
        config |= {"use_sliding_window": any(windowed), "sliding_window": model.sliding_window}
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in windowed]
        # What older versions of transformers read instead: all blocks from this one on have the window.
        config["max_window_layers"] = [*windowed, True].index(True)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = (source or {}).get(key)
    return config


def _refuse_what_we_have_not(config: Config) -> None:
    wanted = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0, "quantization_config": None}
    remedies = {"quantization_config": "; save the model in bf16 with transformers first"}
    for key, value in wanted.items():
        if config.get(key) not in (value, None):
            raise UnsupportedModel(f"{key} {config[key]!r} is not supported, only {value!r}{remedies.get(key, '')}")


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 5 or 4."""
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"rope_parameters {rope} differ between layers or turn a part of each head only")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModel(f"RoPE scaling {kind!r} is not supported; supported are linear, llama3 and yarn")
    factor = float(rope.get("factor") or 1.0)
    if kind == "default" or factor == 1.0:
        return theta, None
    keys: dict[str, Any] = {"kind": kind, "factor": factor}
    if kind != "linear":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        keys["original_sequence_length"] = int(original or config["max_position_embeddings"])
    if kind == "llama3":
        keys["low_frequency_factor"] = float(rope["low_freq_factor"])
        keys["high_frequency_factor"] = float(rope["high_freq_factor"])
    if kind == "yarn":
        if rope.get("truncate") is False:
            raise UnsupportedModel("yarn with truncate false is not supported: the ramp's ends are rounded here")
        keys["beta_fast"], keys["beta_slow"] = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
        given = rope.get("attention_factor")
        keys["attention_factor"] = None if given is None else float(given)
        numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
        if given is None and numerator and denominator:
            grown = 0.1 * math.log(factor)
            keys["attention_factor"] = (numerator * grown + 1) / (denominator * grown + 1)
    return theta, RopeScaling(**keys)


def _rope_scaling_for(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        keys["original_max_position_embeddings"] = scaling.original_sequence_length
    if scaling.kind == "llama3":
        keys |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
    if scaling.kind == "yarn":
        keys |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        keys["attention_factor"] = scaling.yarn_magnitude
    return keys


def _windows(config: Config) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without it where others have one. Llama has none; Mistral's is always on; Qwen's is
    for the layers that it names."""
    family, layers = config["model_type"], config["num_hidden_layers"]
    if family == "llama":
        return None, ()
    window = config.get("sliding_window", 4096)
    if family == "mistral":
        return window, ()
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", 28) if config.get("use_sliding_window", False) else layers
        kinds = ["sliding_attention" if layer >= full else "full_attention" for layer in range(layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        raise UnsupportedModel(
            f"layer_types has {len(kinds)} entries for num_hidden_layers ({layers}), of kinds {sorted(set(kinds))}; "
            "supported are sliding_attention and full_attention, one for each layer"
        )
    if window is None or "sliding_attention" not in kinds:
        return None, ()
    return window, tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def _family(model: ModelConfig, source: Config | None) -> str:
    """The first family that has the model's parts, that of `source` before others."""
    able = {
        "llama": not model.qk_norm and model.attention_bias != "qkv" and set(model.windows) == {None},
        "mistral": not model.qk_norm and model.attention_bias == "none" and len(set(model.windows)) == 1,
        "qwen2": not model.qk_norm and model.attention_bias == "qkv",
        "qwen3": model.qk_norm and model.attention_bias != "qkv",
    }
    preferred = (source or {}).get("model_type")
    for family in [preferred, *able] if preferred in able else able:
        if able[family]:
            return family
    raise UnsupportedModel(
        f"no Hugging Face family has qk_norm {model.qk_norm}, attention_bias {model.attention_bias}, sliding_window "
        f"{model.sliding_window} and full_attention_layers {list(model.full_attention_layers)} together; its weights "
        "can be read with safetensors or from the checkpoint"
    )
