"""Small models of transformers with random weights, one for each family and what is special in it, and ours beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from launch.weights.reader import Part, open_weights
from launch.weights.stored_model import stored_model
from model.attention import kernel_attention
from model.gpt import GPT
from model.kernels import KERNELS

B, S, V = 2, 40, 61
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**tiny(), tie_word_embeddings=True),
    "llama, llama3 scaling": lambda: LlamaConfig(
        **tiny(), rope_parameters=LLAMA3 | {"rope_theta": 900.0, "original_max_position_embeddings": 16}
    ),
    "llama, MHA, biases": lambda: LlamaConfig(**tiny(num_key_value_heads=4), attention_bias=True),
    "mistral, window, wide heads": lambda: MistralConfig(**tiny(head_dim=20), sliding_window=7),
    "mistral, no window": lambda: MistralConfig(**tiny(), sliding_window=None),
    "qwen2": lambda: Qwen2Config(**tiny(), use_sliding_window=False),
    "qwen2, yarn": lambda: Qwen2Config(
        **tiny(num_key_value_heads=1),
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3": lambda: Qwen3Config(**tiny(head_dim=16), tie_word_embeddings=True),
    "qwen3, window on all layers, linear scaling": lambda: Qwen3Config(
        **tiny(head_dim=12),
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=0,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    ),
    "qwen3, window on some layers": lambda: Qwen3Config(
        **tiny(num_hidden_layers=4),
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen2, window on upper layers": lambda: Qwen2Config(
        **tiny(num_hidden_layers=3), use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
}


def tiny(**changes: Any) -> dict[str, Any]:
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return shape | heads | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2} | changes


def downloaded(config: PreTrainedConfig, folder: Path, **options: Any) -> Any:
    """A model of transformers with weights far from any special value (biases and norms too), saved in `folder`."""
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    theirs.save_pretrained(folder, **options)
    return theirs


def ours(folder: Path) -> GPT:
    """The model that a converted folder holds, in fp32."""
    config, weights = stored_model(folder), open_weights(folder)
    model = GPT(config, kernel_attention(KERNELS["cpu"], config))
    with torch.no_grad():
        weights.read([Part(name, (0,) * p.dim(), p.data) for name, p in model.named_parameters()])
    return model


def tokens() -> Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return model(tokens()).logits


@torch.no_grad()
def our_logits(model: GPT) -> Tensor:
    logits = model(tokens(), torch.arange(S).expand(B, S))
    assert isinstance(logits, Tensor)
    return logits


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))
