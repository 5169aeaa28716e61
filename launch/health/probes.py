"""Measures each rank's device, links and file system before the first step, and compares them with its peers'."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from launch.health.hang_report import Member

_REPEATS = 5
_MATMUL_SECONDS = 0.2
"""Longer than a time slice of a busy host, and than a GPU takes to raise its clock."""


@dataclass(frozen=True)
class Load:
    """How much is measured with: enough to be in the steady state, and over in a moment."""

    matrix: int
    """Rows of the square matrices."""
    dtype: torch.dtype
    message_bytes: int
    file_bytes: int


LOADS = {
    "cuda": Load(8192, torch.bfloat16, 64 << 20, 64 << 20),
    "cpu": Load(512, torch.float32, 4 << 20, 8 << 20),
}


@dataclass(frozen=True)
class Rates:
    """The measurements of one rank; None for those it takes no part in."""

    matmul: float
    """FLOP/s."""
    node: float | None
    """Bytes/s of an all-reduce among the ranks of its node: the volume that a ring algorithm sends."""
    pairs: float | None
    """The same over its node and one beside it, the better of its two neighbours: a good node may have a bad one."""
    write: float | None
    """Bytes/s into the run directory, down to the disk; the first rank of each node."""


@dataclass(frozen=True)
class Outlier:
    """A rate far below that of its peers."""

    node: str
    what: str
    words: str


class Links:
    """This rank's groups for as long as it measures: its node's, and those of its node and each neighbour."""

    def __init__(self, rank: int, members: Sequence[Member]) -> None:
        """Collective over the world, for each group by turns: torch names groups that only their members make by what
        else there is, and would give a name twice."""
        nodes = _nodes(members)
        ranks, own = list(nodes.values()), list(nodes).index(members[rank].host)
        self.node = _group(ranks, [(one,) for one in range(len(ranks))], own)
        self.pairs = [_group(ranks, meeting, own) for meeting in pairings(len(ranks))]
        """One for each round; None where this node sits out."""

    def close(self) -> None:
        """Their buffers would stay for the whole run."""
        for group in (self.node, *self.pairs):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def _group(ranks: Sequence[list[int]], nodes: Sequence[tuple[int, ...]], own: int) -> dist.ProcessGroup | None:
    """Makes a group of each tuple of nodes; the one with this node, None if there is none or it holds one rank."""
    mine = None
    for numbers in nodes:
        those = [rank for number in numbers for rank in ranks[number]]
        whole = len(those) == dist.get_world_size()
        group = dist.group.WORLD if whole else dist.new_group(those, group_desc="probe")
        if own in numbers and len(those) > 1:
            mine = group
    return mine


def probe(device: torch.device, rank: int, members: Sequence[Member], links: Links, folder: Path) -> list[Rates]:
    """Every rank's rates, in the order of ranks. Collective over the world; takes a second or two."""
    load = LOADS[device.type]
    matmul = _matmul_rate(device, load)
    node = _within(links.node, device, load)
    pairs = []
    for pair in links.pairs:
        dist.barrier()  # neighbours start together; the others must not compute meanwhile
        pairs.append(_within(pair, device, load))
    dist.barrier()
    leads = _nodes(members)[members[rank].host][0] == rank
    write = _write_rate(folder / f"probe-{rank}", load) if leads else None
    mine = Rates(matmul, node, max((rate for rate in pairs if rate is not None), default=None), write)
    found: list[Rates] = [mine] * len(members)
    dist.all_gather_object(found, mine)
    return found


def pairings(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each of `count` nodes in a circle meets the next one; in a round nobody meets two."""
    circle = [(first, (first + 1) % count) for first in range(count if count > 2 else count - 1)]
    last = [circle.pop()] if circle and count % 2 else []
    return [meeting for meeting in (circle[::2], circle[1::2], last) if meeting]


_KINDS = (
    ("matmul", "FLOP/s", "matmul"),
    ("all-reduce within the node", "B/s", "node"),
    ("all-reduce with the next node", "B/s", "pairs"),
    ("writing", "B/s", "write"),
)
"""What is measured, its unit, and the attribute of Rates that has it."""


def outliers(found: Sequence[Rates], members: Sequence[Member], share: float) -> list[Outlier]:
    """The rates below `share` of the median of all others of their kind. A node's first rank speaks for its links and
    its disk."""
    every = {member.rank: f"rank {member.rank}" for member in members}
    first = {ranks[0]: host for host, ranks in _nodes(members).items()}
    slow = []
    for kind, unit, attribute in _KINDS:
        owners = every if attribute == "matmul" else first
        rates = {rank: rate for rank in owners if (rate := getattr(found[rank], attribute)) is not None}
        for rank, rate in rates.items():
            peers = [other for peer, other in rates.items() if peer != rank]
            if peers and rate < share * (usual := median(peers)):
                node, owner = members[rank].host, owners[rank]
                told = (
                    f"{node}: {kind} of {owner}, {_si(rate)}{unit}, is {rate / usual:.0%} of its peers' "
                    f"{_si(usual)}{unit}"
                )
                slow.append(Outlier(node, f"{kind} of {owner}", told))
    return slow


def summary(found: Sequence[Rates], seconds: float) -> str:
    """Medians, and the range where there is one."""
    parts = []
    for kind, unit, attribute in _KINDS:
        values = [rate for rates in found if (rate := getattr(rates, attribute)) is not None]
        if values:
            around = f" ({_si(min(values))} to {_si(max(values))})" if len(values) > 1 else ""
            parts.append(f"{kind} {_si(median(values))}{unit}{around}")
    return f"probed in {seconds:.1f} s, medians (and range): {'; '.join(parts)}"


def _si(rate: float) -> str:
    """1.23 G"""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if rate >= size:
            return f"{rate / size:.3g} {prefix}"
    return f"{rate:.3g} "


def _nodes(members: Sequence[Member]) -> dict[str, list[int]]:
    nodes: dict[str, list[int]] = {}
    for member in members:
        nodes.setdefault(member.host, []).append(member.rank)
    return nodes


def _matmul_rate(device: torch.device, load: Load) -> float:
    size = load.matrix
    left, right = (torch.randn(size, size, device=device).to(load.dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: left @ right, device, _MATMUL_SECONDS)


def _within(group: dist.ProcessGroup | None, device: torch.device, load: Load) -> float | None:
    """Bytes/s of an all-reduce in `group`, whose ranks all call this at once; None for none."""
    if group is None:
        return None
    size = dist.get_world_size(group)
    message = torch.ones(load.message_bytes // 4, device=device)
    seconds = fastest(lambda: dist.all_reduce(message, group=group), device)
    return 2 * (size - 1) / size * load.message_bytes / seconds


def fastest(work: Callable[[], object], device: torch.device, at_least: float = 0.0) -> float:
    """Seconds of the quickest of a few repetitions, or of as many as `at_least` seconds hold, after one that does not
    count: what else the machine does only ever adds to them."""
    times: list[float] = []
    while len(times) <= _REPEATS or sum(times) < at_least:
        _finish(device)
        begun = time.perf_counter()
        work()
        _finish(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write_rate(path: Path, load: Load) -> float | None:
    """Bytes per second, or None if it cannot be written; the run itself will report that."""
    block = os.urandom(1 << 20)  # what some file systems do not compress
    begun = time.perf_counter()
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(load.file_bytes >> 20):
                file.write(block)
            os.fsync(file.fileno())
        return load.file_bytes / (time.perf_counter() - begun)
    except OSError:
        return None
    finally:
        path.unlink(missing_ok=True)  # a full disk gets its space back
