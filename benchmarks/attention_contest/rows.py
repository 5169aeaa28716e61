"""The shapes that are measured, and what is demanded of them. Imports no torch.

P ranks share a sequence of S = P x local_tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from parallel.sequence import causal_pairs

HEAD_DIM = 128
ONE_GPU = "one GPU, whole sequence"
MEDIAN_DOCUMENT, SIGMA = 1024, 1.2


@dataclass(frozen=True)
class Row:
    """One shape: query/KV heads, tokens of one rank, a window (0: none) and a seed of document lengths (0: none)."""

    heads: int
    key_value_heads: int
    local_tokens: int
    window: int = 0
    documents: int = 0

    @property
    def name(self) -> str:
        window = f", window {self.window}" if self.window else ""
        packed = f", documents of seed {self.documents}" if self.documents else ""
        thousands, rest = divmod(self.local_tokens, 1024)
        tokens = f"{self.local_tokens}" if rest else f"{thousands}k"
        return f"{self.heads}/{self.key_value_heads} heads, {tokens} tokens per rank{window}{packed}"

    def boundaries(self, ranks: int) -> list[int]:
        """Where the documents of the whole sequence begin, and its end."""
        length = self.local_tokens * ranks
        return [0, *itertools.accumulate(document_lengths(length, self.documents))] if self.documents else [0, length]

    def flops(self, ranks: int) -> float:
        """Of a forward pass over the whole sequence: 4 x heads x head_dim x visible pairs. A backward takes 2.5 times
        as many (five products of matrices instead of two)."""
        documents = itertools.pairwise(self.boundaries(ranks))
        pairs = sum(causal_pairs(end - start, self.window or None) for start, end in documents)
        return 4.0 * self.heads * HEAD_DIM * pairs


def document_lengths(total: int, seed: int) -> list[int]:
    """Long-tailed: log-normal, median 1,024 tokens, sigma 1.2 (the mean is 2,104); the last is cut to fit."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(draw.lognormvariate(math.log(MEDIAN_DOCUMENT), SIGMA)))))
    return lengths


ANCHOR = Row(32, 8, 8192)
"""Every run measures it again: it tells how far the clocks of two runs are apart."""


def grid() -> list[Row]:
    """Heads x lengths x masks, the short ones first."""
    heads = [(32, 8), (16, 4), (8, 2), (32, 32)]
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    masks = [(0, 0), (1024, 0), (4096, 0), (0, 1)]
    return [Row(*pair, length, *mask) for length in lengths for pair in heads for mask in masks]


def all_rows() -> list[Row]:
    """The grid, and three more draws of documents at 8k and 16k tokens per rank."""
    more = [Row(32, 8, length, 0, seed) for seed in (2, 3) for length in (8192, 16384)]
    return grid() + more


@dataclass(frozen=True)
class Bar:
    """`ours` must be at least `required` times as fast as `rival`: the ideal, which is one GPU's time divided by the
    number of GPUs, or the fastest peer whose name begins so."""

    row: Row
    kernel: str
    rival: str
    required: float
    aim: float


IDEAL = "the ideal"
TORCH = "torch context_parallel"
RING_FLASH_ATTN = "ring-flash-attn"


def bars() -> list[Bar]:
    """What this project demands of itself."""
    demands = {2048: (0.60, 0.75), 4096: (0.82, 0.90), 8192: (0.94, 0.97), 16384: (0.97, 0.99), 32768: (0.97, 0.99)}
    found = [Bar(Row(32, 8, length), "flash_attn_4", IDEAL, *demand) for length, demand in demands.items()]
    found.append(Bar(Row(8, 2, 16384), "flash_attn_4", IDEAL, 0.95, 0.97))
    for length, seed in ((8192, 1), (8192, 2), (8192, 3), (16384, 1), (16384, 2), (16384, 3)):
        found.append(Bar(Row(32, 8, length, 0, seed), "flash_attn_4", IDEAL, 0.90, 0.95))
    found.append(Bar(Row(32, 8, 32768), "flash_attn_4", TORCH, 1.14, 1.17))
    found.append(Bar(Row(32, 8, 8192), "flash_attn_4", TORCH, 1.35, 1.50))
    for row in (Row(8, 2, 16384), *(Row(32, 8, length) for length in demands)):
        found.append(Bar(row, "flash_attn_2", RING_FLASH_ATTN, 1.0, 1.0))
    return found
