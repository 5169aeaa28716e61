"""Finds ranks that are slower than the others, again and again.

All ranks of a step take the same time: the slow one computes, the others wait for it, mostly inside collectives. So
each rank measures what nobody else can slow down: a fixed small piece of work on its device, and the time that its data
took. It does so at logged steps only, when the device has been waited for anyway. The numbers travel between the hosts
while training continues, and are read at the next logged step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from launch.health.hang_report import Member
from launch.health.probes import fastest

_IN_A_ROW = 10
"""Looks; after fewer, ranks that share a busy CPU would be named by chance."""
_LEAST_DATA_SECONDS = 0.05
"""Waiting for data that takes less than this holds up nobody."""
_SIZES = {"cuda": 4096, "cpu": 192}


@dataclass(frozen=True)
class Slowest:
    """The slowest rank at one logged step."""

    rank: int
    ratio: float
    """Its time over the median of the others'."""
    what: str
    """computing or reading data."""


@dataclass(frozen=True)
class Finding:
    """The result of one look."""

    scalars: dict[str, float]
    """For TensorBoard and metrics.jsonl."""
    named: str | None
    """The rank that has been slow at ten looks in a row; said once."""


class Stragglers:
    """Looks at all ranks; every rank calls `look` at the same steps."""

    def __init__(self, device: torch.device, members: Sequence[Member], ratio: float) -> None:
        """Collective: makes a process group."""
        self._device, self._members, self._ratio = device, members, ratio
        self._group = dist.new_group(backend="gloo", group_desc="stragglers")
        size = _SIZES[device.type]
        self._matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
        self._times: list[torch.Tensor] = []
        self._travelling: dist.Work | None = None
        self._row: list[Slowest] = []

    def look(self, data_seconds: float) -> Finding | None:
        """What the look before has found; None at the first. `data_seconds`: what a step has waited for its data."""
        finding = None
        if self._travelling is not None:
            self._travelling.wait()
            finding = self._judge([slot.tolist() for slot in self._times])
        mine = torch.tensor([fastest(lambda: self._matrix @ self._matrix, self._device), data_seconds])
        self._times = [torch.zeros(2) for _ in self._members]
        self._travelling = dist.all_gather(self._times, mine, group=self._group, async_op=True)
        return finding

    def _judge(self, times: Sequence[Sequence[float]]) -> Finding:
        worst = slowest([work for work, _ in times], [data for _, data in times])
        slow = worst.ratio > self._ratio
        same = self._row and self._row[-1].rank == worst.rank
        self._row = ([*self._row, worst] if same else [worst]) if slow else []
        scalars = {"slowest_rank": float(worst.rank), "slowest_over_median": worst.ratio}
        if len(self._row) >= _IN_A_ROW:
            scalars["straggler"] = float(worst.rank)
        named = None
        if len(self._row) == _IN_A_ROW:
            ratio = median(one.ratio for one in self._row)
            named = (
                f"rank {worst.rank} on {self._members[worst.rank].host} was the slowest at {_IN_A_ROW} logged steps "
                f"in a row, {ratio:.2f} x the median of the others in {worst.what}"
            )
        return Finding(scalars, named)


def slowest(work: Sequence[float], data: Sequence[float]) -> Slowest:
    """The slowest rank, by each rank's seconds of fixed work and of waiting for data."""
    found = []
    for what, times, least in (("computing", work, 0.0), ("reading data", data, _LEAST_DATA_SECONDS)):
        floored = [max(seconds, least) for seconds in times]
        rank = max(range(len(floored)), key=floored.__getitem__)
        others = floored[:rank] + floored[rank + 1 :]
        found.append(Slowest(rank, floored[rank] / max(median(others), 1e-9), what))
    return max(found, key=lambda one: one.ratio)
