"""A permutation of range(size) that needs no memory: any element takes constant time, whatever the size."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from launch.data.corpus import Int64

ROUNDS = 8


class Permutation:
    """A keyed bijection of range(size).

    A balanced Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom
    functions", 1988) permutes the smallest 2**(2h) >= size; a value that falls outside the range is permuted again
    until it falls inside, which keeps the map a bijection (cycle walking: Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002) and takes fewer than four turns on average. The round function is splitmix64's finaliser
    (Steele, Lea and Flood, 2014). Shuffling, not secrecy, is the purpose. Nothing depends on a library's random
    generator, so the order is the same for every version of numpy.
    """

    def __init__(self, size: int, seed: int, stream: str) -> None:
        """`stream` separates the uses of one seed: two streams give unrelated orders."""
        assert 0 < size < 1 << 62, size
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._shift = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, indices: npt.ArrayLike) -> Int64:
        """Images of `indices` (any shape, each in range(size)), int64, same shape."""
        positions = np.asarray(indices, dtype=np.int64)
        assert positions.size == 0 or (positions.min() >= 0 and positions.max() < self.size)
        values = self._encrypt(positions.reshape(-1).astype(np.uint64))
        size = np.uint64(self.size)
        while (outside := values >= size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64).reshape(positions.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._shift, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._shift) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser; products wrap modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
