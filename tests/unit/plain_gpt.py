"""A second GPT, written from the papers: no torch.nn, no code shared with the first; repeated heads,
complex rotations, an explicit softmax.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import cmath
import math
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from tests.unit.gpt_cases import DOCUMENT_LENGTHS, B, S


def plain_frequencies(config: ModelConfig) -> list[float]:
    """Radians a position of each rotated pair: RoFormer (3.2.2), and the published code of each scaling."""
    frequencies = [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in frequencies]
    if scaling.kind == "yarn":
        return plain_yarn(config, scaling)
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_sequence_length / scaling.high_frequency_factor:
            scaled.append(frequency)
        elif wavelength > scaling.original_sequence_length / scaling.low_frequency_factor:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_sequence_length / wavelength - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return scaled


def plain_yarn(config: ModelConfig, scaling: RopeScaling) -> list[float]:
    """`YaRNScaledRotaryEmbedding` of the paper's repository."""

    def correction(rotations: float) -> float:
        span = math.log(scaling.original_sequence_length / (rotations * 2 * math.pi))
        return config.head_dim * span / (2 * math.log(config.rope_theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), config.head_dim - 1)
    scaled = []
    for pair in range(config.head_dim // 2):
        inverse = 1 / config.rope_theta ** (2 * pair / config.head_dim)
        mask = 1 - min(1.0, max(0.0, (pair - low) / (high - low)))
        scaled.append(inverse / scaling.factor * (1 - mask) + inverse * mask)
    return scaled


def plain_rotate(heads: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """[B, S, H, D]: dims d and d + D/2 are one complex number, turned by position x frequency."""
    turns = [[[cmath.exp(1j * p * f) for f in plain_frequencies(config)] for p in row] for row in positions.tolist()]
    pairs = torch.complex(*heads.chunk(2, dim=-1)) * torch.tensor(turns, dtype=torch.complex128)[:, :, None]
    if config.rope_scaling is not None and config.rope_scaling.kind == "yarn":
        pairs = pairs * (config.rope_scaling.attention_factor or 0.1 * math.log(config.rope_scaling.factor) + 1)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def plain_linear(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def plain_visible(config: ModelConfig, layer: int, lengths: tuple[int, ...]) -> Tensor:
    """[B, S, S], True where the row's query sees the key."""
    window = None if layer in config.full_attention_layers else config.sliding_window
    visible = torch.zeros(B, S, S, dtype=torch.bool)
    for start, end in pairwise([0, *accumulate(lengths)]):
        for query in range(start, end):
            for key in range(start, query + 1):
                if window is None or query - key < window:
                    visible[query // S, query % S, key % S] = True
    return visible


def plain_logits(p: dict[str, Tensor], config: ModelConfig, inputs: dict[str, Any], packed: bool) -> Tensor:
    eps, width = config.rms_norm_eps, config.head_dim
    positions = inputs["position_ids"]
    x = p["embed_tokens.weight"][inputs["input_ids"]]
    for number in range(config.num_hidden_layers):
        visible = plain_visible(config, number, DOCUMENT_LENGTHS if packed else (S,) * B)
        w = {name.removeprefix(f"layers.{number}."): weight for name, weight in p.items()}
        y = plain_norm(x, w["attention_norm.weight"], eps)
        q, k, v = (plain_linear(y, w, f"attention.{c}_proj").view(B, S, -1, width) for c in "qkv")
        if config.qk_norm:
            q = plain_norm(q, w["attention.q_norm.weight"], eps)
            k = plain_norm(k, w["attention.k_norm.weight"], eps)
        q, k = plain_rotate(q, positions, config), plain_rotate(k, positions, config)
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = (torch.stack([heads] * group, dim=3).flatten(2, 3) for heads in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
        weights = torch.where(visible[:, None], scores.exp(), 0)
        weights = weights / weights.sum(-1, keepdim=True)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, S, -1)
        x = x + plain_linear(attended, w, "attention.o_proj")
        y = plain_norm(x, w["feed_forward_norm.weight"], eps)
        gate, up = y @ w["feed_forward.gate_proj.weight"].T, y @ w["feed_forward.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w["feed_forward.down_proj.weight"].T
    head = p["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return plain_norm(x, p["norm.weight"], eps) @ head.T


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != -100:
            total = total + row.exp().sum().log() - row[label]
    return total
