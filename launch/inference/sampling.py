"""Choosing the next token from logits.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters apply in this order: temperature, top_k, top_p."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that reach this probability together (nucleus sampling, arXiv:1904.09751)."""
    seed: int = 0
    """Sequence i of a batch draws from a stream of its own, seeded by seed + i: a batch changes nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature ({self.temperature}) must be 0 or more; 0 takes the likeliest token")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed ({self.seed}) must be 0 or more, and below 2^63 = {2**63}")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be 0 or more; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1; 1 draws among all tokens")

    def streams(self, count: int) -> list[torch.Generator]:
        """One stream of random numbers for each sequence, on the host: the device changes nothing."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(count)]


def choose(logits: Tensor, sampling: Sampling, streams: Sequence[torch.Generator]) -> Tensor:
    """The next token [B] of each sequence, from its logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    device = logits.device
    if torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # a GPU's cumsum is refused then
    thresholds = torch.stack([torch.rand((), generator=stream) for stream in streams]).to(logits.device)
    likeliest, tokens = (logits.float() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        likeliest[:, sampling.top_k :] = -torch.inf
    probabilities = likeliest.softmax(dim=-1)
    if sampling.top_p < 1:  # a token stays if those before it do not suffice
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    cumulative = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, thresholds.unsqueeze(1) * cumulative[:, -1:])
    return tokens.gather(1, chosen.clamp(max=logits.shape[1] - 1)).squeeze(1).to(device)
