"""What the kernel calls of an exchange and of a ring cost by themselves, without any communication, on one GPU.

    python benchmarks/attention_parts.py [--kernel flash_attn_4]

c tokens are half of one rank's share where two ranks hold chunks (0, 3) and (1, 2). An exchange's rank 0 calls c x 4c
and c x c, its rank 1 calls 2c x 3c, all causal; a ring calls 2c x 2c causal and then a full c x 2c or 2c x c. The ideal
is half of 4c x 4c. Forward and backward milliseconds, medians; where c is small they are the host's time, not the
GPU's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch

from model.kernels import KERNELS, AttentionKernel, AttentionMask

HEAD_DIM = 128
SHAPES = [(32, 8, 1024), (32, 8, 2048), (32, 8, 4096), (8, 2, 8192)]
"""Query heads, KV heads, c."""
CALLS = [(4, 4, True), (1, 4, True), (1, 1, True), (2, 3, True), (2, 2, True), (1, 2, False), (2, 1, False)]
"""Queries and keys in c tokens, and whether causal (aligned at the ends)."""


def median_ms(action: Callable[[], object], repetitions: int = 15) -> float:
    """Median time between events around repeated calls."""
    for _ in range(3):
        action()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in pairwise(marks))


def measure(kernel: AttentionKernel, heads: int, kv_heads: int, queries: int, keys: int, causal: bool) -> list[float]:
    """[forward, backward] of one call, milliseconds."""

    def random(tokens: int, count: int) -> torch.Tensor:
        return torch.randn(1, tokens, count, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    q, dout = random(queries, heads), random(queries, heads)
    k, v = random(keys, kv_heads), random(keys, kv_heads)
    mask, scale = AttentionMask(causal=causal, offset=keys - queries if causal else 0), HEAD_DIM**-0.5
    out, lse = kernel.forward(q, k, v, scale, mask)
    return [
        median_ms(lambda: kernel.forward(q, k, v, scale, mask)),
        median_ms(lambda: kernel.backward(dout, q, k, v, out, lse, scale, mask)),
    ]


def main() -> None:
    """Prints one line for each shape and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="flash_attn_4")
    kernel = KERNELS[parser.parse_args().kernel]
    for heads, kv_heads, c in SHAPES:
        for queries, keys, causal in CALLS:
            forward, backward = measure(kernel, heads, kv_heads, queries * c, keys * c, causal)
            call = f"{queries}c x {keys}c {'causal' if causal else 'full'}"
            print(f"{heads}/{kv_heads} heads, c {c}: {call:16} forward {forward:7.3f}  backward {backward:7.3f}")


if __name__ == "__main__":
    main()
