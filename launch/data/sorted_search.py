"""Searching a sorted array that lies on disk."""

from __future__ import annotations

from bisect import bisect_left
from math import isqrt

import numpy as np
import numpy.typing as npt

_FEW = 512
"""Entries that lie in a page or two."""


def search_left(array: npt.NDArray[np.int64], value: int) -> int:
    """The first index whose entry is at least `value`, as bisect_left gives it, in fewer pages of a mapped array.

    Where a bisection of 10^9 entries touches twenty pages that no search before has touched, entries that grow evenly
    are found in four or five: each round looks a square root to both sides of where the value should lie (interpolation
    search: Perl, Itai and Avni, 1978). A round that misses bisects too, so the worst case is logarithmic.
    """
    low, high = 0, len(array)  # the answer is among low..high
    while high - low > _FEW:
        first, last = int(array[low]), int(array[high - 1])
        if value <= first or value > last:
            return low if value <= first else high
        expected, reach = low + (value - first) * (high - 1 - low) // (last - first), isqrt(high - low)
        before, after = max(low, expected - reach), min(high - 1, expected + reach)
        if array[before] >= value:
            high = before
        elif array[after] < value:
            low = after + 1
        else:
            low, high = before + 1, after
            continue
        middle = (low + high) // 2
        if low < high:
            low, high = (middle + 1, high) if array[middle] < value else (low, middle)
    return bisect_left(array, value, low, high)
