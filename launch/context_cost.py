"""Estimates what a layer's attention costs in milliseconds, forward and backward, on H200s linked by NVLink.

Use it to compare modes of context parallelism, from a few hundred tokens a rank up. It does not predict times on other
machines. A layer takes as long as the slower of its host (issuing the work) and its GPU: kernels, and the messages and
sums beside which no kernel runs.

Every constant was measured on one or two H200s with flash_attn_4 in bf16, 32/8 heads of 128
(docs/ring_attention_table.md, and runs of 2026-11-23).
"""

from __future__ import annotations

from dataclasses import dataclass

_RATE = 600e9
"""FLOP per ms of a kernel that is long enough. One GPU alone reaches 612 at 65,536 tokens; two at work run cooler."""
_TILE = 128
"""Masked pairs that a query costs at the edges of the mask: kernels compute whole tiles."""
_CALL = 0.05
"""Ms of a kernel call in which the GPU fills and empties: one of 4,096 tokens reaches 518 TFLOP/s forward and backward,
one of 16,384 589."""
_LINK = 350e6
"""Bytes per ms from GPU to GPU: 289 GB/s in copies of 8 MiB, 361 in copies of 64."""
_MERGE = 2.1e-8
"""Ms for every number of an output that a ring merges, forward and backward: 1.4 ms at 8k tokens a rank, 5.6 at 32k."""
_HOST, _HOST_CALL, _HOST_MESSAGE = 0.55, 0.2, 0.28
"""Ms of the host: once, for every kernel call and for every message. 2,048 tokens a rank took 1.93 by exchange (four
calls, two messages), 3.58 in two groups of heads and 5.10 in three (each group two calls, four messages)."""


@dataclass(frozen=True)
class Work:
    """The work of the busiest rank in one layer, forward and backward."""

    pairs: int
    """(query, key) pairs that causality and the window leave, in all its heads."""
    queries: int
    """Queries, in all heads."""
    head_dim: int
    calls: int
    """Kernel calls."""
    messages: int
    """Times that all ranks hand each other something."""
    exposed_bytes: int
    """Received while no kernel can run: what the first call waits for, and what is left after the last."""
    merged: int = 0
    """Numbers of partial outputs."""

    @property
    def milliseconds(self) -> float:
        """The longer of host and GPU."""
        host = _HOST + _HOST_CALL * self.calls + _HOST_MESSAGE * self.messages
        flops = 3.5 * 4 * self.head_dim * (self.pairs + _TILE * self.queries)  # a backward is 2.5 forwards
        gpu = flops / _RATE + _CALL * self.calls + self.exposed_bytes / _LINK + _MERGE * self.merged
        return max(host, gpu)
