"""Chooses the corpus of each sample by weight, by a formula: nothing is built and nothing is stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

import numpy as np

from launch.data.corpus import Int64

_TURN = 1 << 64
_STRIDE = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio, odd."""


class Blend:
    """Sample t belongs to the corpus in whose share of the circle the point (phase + t * golden ratio) mod 1 falls.

    The points of that sequence (Weyl, 1916) are spread as evenly as can be: in any stretch of samples each corpus has
    its weight's share, give or take a few. How many of the first t samples a corpus has is a sum of floors, exact in
    logarithmic time. Integers modulo 2**64 throughout, so every machine agrees.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        """`weights` need not add up to 1; one of 0 is never drawn, one at least is positive."""
        positive = {name: Fraction(weight) for name, weight in weights.items() if weight > 0}
        assert positive, weights
        self.names = tuple(positive)
        *inner, whole = accumulate(positive.values())
        self._edges = np.array([math.floor(share / whole * _TURN) for share in inner], dtype=np.uint64)
        self._phase = int.from_bytes(hashlib.blake2b(f"{seed}/blend".encode(), digest_size=8).digest(), "little")

    def corpora(self, samples: Int64) -> Int64:
        """The index in `names` of each sample's corpus, same shape."""
        points = samples.astype(np.uint64) * np.uint64(_STRIDE) + np.uint64(self._phase)  # wraps
        return np.searchsorted(self._edges, points, side="right").astype(np.int64)

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the samples 0..samples-1 each corpus has."""
        below = [0, *(self._points_below(edge, samples) for edge in self._edges.tolist()), samples]
        return {name: below[i + 1] - below[i] for i, name in enumerate(self.names)}

    def _points_below(self, edge: int, samples: int) -> int:
        """#{t < samples: (phase + t * stride) mod 2**64 < edge}: [x mod m < e] is floor(x / m) - floor((x - e) / m)."""
        reached = _sum_of_floors(samples, _TURN, _STRIDE, self._phase)
        return samples + reached - _sum_of_floors(samples, _TURN, _STRIDE, self._phase - edge + _TURN)


def _sum_of_floors(n: int, m: int, a: int, b: int) -> int:
    """sum over i < n of floor((a * i + b) / m), for a, b >= 0, by Euclid's algorithm (Graham, Knuth and Patashnik,
    Concrete Mathematics, section 3.5)."""
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        n, b = divmod(top, m)
        m, a = a, m
    return total
