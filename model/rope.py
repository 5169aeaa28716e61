"""Rotary positions (RoFormer, arXiv:2104.09864), and the ways of stretching them past the length they were trained on.

Shapes: B batch, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def rotary_tables(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, 1, D/2] of the rotary angles at `position_ids` [B, S].

    Angles are computed in fp32 (fp64 for a fp64 model): a bf16 position is wrong from 257 on.
    """
    precision = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=precision, device=position_ids.device) / config.head_dim
    frequencies, magnitude = config.rope_theta**-exponents, 1.0
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, scaling)
    elif scaling is not None:
        frequencies, magnitude = _yarn_frequencies(frequencies, scaling, config), scaling.yarn_magnitude
    angles = (position_ids.to(precision).unsqueeze(-1) * frequencies).unsqueeze(2)
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def rotate(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Applies the rotation to [B, S, H, D]; pairs are (d, d + D/2), the half-split layout of Llama checkpoints."""
    cos, sin = tables
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_sequence_length / wavelengths
    keep = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    return _blended(frequencies, keep.clamp(0, 1), scaling.factor)


def _yarn_frequencies(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Pairs that turn often within the original context are kept, those that turn little are stretched, with a ramp
    over the pairs between (YaRN, section 3.2; the ramp's ends are rounded outwards, as in its published code)."""

    def pair_that_turns(turns: float) -> float:
        wavelength = scaling.original_sequence_length / turns
        return config.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), config.head_dim - 1)
    pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    ramp = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return _blended(frequencies, 1 - ramp, scaling.factor)


def _blended(frequencies: Tensor, keep: Tensor, factor: float) -> Tensor:
    """`keep` 1: as they are; 0: stretched by `factor`."""
    return keep * frequencies + (1 - keep) * frequencies / factor
