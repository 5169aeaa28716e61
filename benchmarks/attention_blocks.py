"""Why calls of attention lose: a model of their thread blocks on a GPU's multiprocessors, without a GPU.

    python benchmarks/attention_blocks.py

flash_attn_4 on Hopper gives each block 128 queries (forward) or 128 keys (backward) of one head, and each
multiprocessor one block at a time, in the order of issue. Forward: sections of as many KV heads as fit in L2, the
longest blocks of a section first. Backward: one head after the other, each from its longest block to its shortest; in
sections of heads ("in turns") where it is deterministic, or told so by `model/kernels/flash_attn_4.py`. A block costs
its tiles and a few more for its beginning and its end.

c tokens are half of one rank's share where two ranks hold chunks (0, 3) and (1, 2), as in attention_parts.py, whose
figures on one H200 stand beside. `moved` tiles of 128 tokens go from rank 0's far chunk to its near one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

MULTIPROCESSORS = 132
L2 = 50 * 2**20
"""Bytes, as the package counts."""
HEAD_DIM, TILE, GROUP = 128, 128, 4
OVERHEAD = 4
"""Tiles that cost as much as a block's beginning and end; fitted, as are the next two, to one GPU's whole sequence."""
FORWARD, BACKWARD = 1.617e-3, 2.315e-3
"""Ms of a forward tile of 128 x 128 and a backward one of 64 x 128 at 32,768 tokens."""
MEASURED = {(32, 8192): (97.2, 98.1), (8, 8192): (95.7, 99.8), (32, 4096): (94.0, 97.0), (32, 2048): (90.2, 95.9)}
"""Query heads and c: share of the ideal that rank 0's and rank 1's calls reach by themselves, %."""


def last_to_end(blocks: Iterable[int]) -> int:
    """When the last block ends if each goes to the first multiprocessor that is free: in tiles."""
    free = [0] * MULTIPROCESSORS
    for tiles in blocks:
        heapq.heapreplace(free, free[0] + tiles + OVERHEAD)
    return max(free)


def in_sections(blocks: list[int], heads: int, at_a_time: int) -> Iterable[int]:
    """Blocks of all heads, `at_a_time` heads advancing together."""
    for first in range(0, heads, at_a_time):
        for tiles in blocks:
            yield from [tiles] * min(at_a_time, heads - first)


def fitting(bytes_of_a_head: int) -> int:
    """Heads of a section: a power of two."""
    return 1 << max(1, L2 // bytes_of_a_head).bit_length() - 1


def forward(queries: int, keys: int, heads: int) -> float:
    """Ms of a causal call, aligned at the ends. A block holds 32 queries of the four heads that share keys."""
    offset, per_block = keys - queries, TILE // GROUP
    blocks = [-(-(offset + start + per_block) // TILE) for start in range(0, queries, per_block)][::-1]
    return FORWARD * last_to_end(in_sections(blocks, heads // GROUP, fitting(keys * HEAD_DIM * 4)))


def backward(queries: int, keys: int, heads: int, in_turns: bool = False) -> float:
    """Ms of its backward."""
    offset = keys - queries
    blocks = [(queries - max(0, start - offset)) // (TILE // 2) for start in range(0, keys, TILE)]
    return BACKWARD * last_to_end(in_sections(blocks, heads, fitting(queries * HEAD_DIM * 8) if in_turns else 1))


def both(queries: int, keys: int, heads: int, in_turns: bool) -> float:
    return forward(queries, keys, heads) + backward(queries, keys, heads, in_turns)


def shares(heads: int, c: int, moved: int, in_turns: bool) -> tuple[float, float]:
    """Of each rank's calls, of half of one GPU's time with the same kernels, %."""
    near, far = c + TILE * moved, c - TILE * moved
    ideal = both(4 * c, 4 * c, heads, in_turns) / 2
    zero = both(far, 4 * c, heads, in_turns) + both(near, near, heads, in_turns)
    return 100 * ideal / zero, 100 * ideal / both(2 * c, near + 2 * c, heads, in_turns)


def main() -> None:
    """Prints all shapes."""
    print("heads, c    | measured, rank 0 and 1 | modelled      | moved 1       | in turns      | in turns, moved 1")
    for (heads, c), measured in MEASURED.items():
        modelled = [shares(heads, c, moved, in_turns) for in_turns in (False, True) for moved in (0, 1)]
        columns = " | ".join(f"{zero:5.1f}   {one:5.1f}" for zero, one in (measured, *modelled))
        print(f"{heads:2}, {c:6,}  |          {columns}")
    print("\none GPU's backward, 32 heads: head by head over in turns")
    for tokens in (4096, 8192, 16384, 32768):
        print(f"{tokens:7,} tokens: {backward(tokens, tokens, 32) / backward(tokens, tokens, 32, True):.3f}")


if __name__ == "__main__":
    main()
