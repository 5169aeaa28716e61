"""Probes and the search for slow ranks, on real groups: what one bad rank or node changes, every rank agrees on."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from launch.health import probes, stragglers
from launch.health.hang_report import Member
from launch.health.probes import Links, Rates, outliers, probe, summary
from launch.health.stragglers import Finding, Stragglers
from tests.distributed.harness import run_distributed

WORLD = 4
CPU = torch.device("cpu")
USUAL, SLOW = 0.25, 2.5
"""Seconds that a disk of the tests takes for what was written; a real one may have other things to do."""


CASES = ((1, None, 1), (2, 2, 1), (3, 2, 1), (4, 3, 2))
"""Nodes that the ranks are on, the rank that writes to a slow disk, and times probed: twice as after an outlier."""


def probed(folder: str) -> list[list[Rates]]:
    return [_probed(folder, *case) for case in CASES]


def _probed(folder: str, nodes: int, slow_writer: int | None, times: int) -> list[Rates]:
    rank = dist.get_rank()
    members = [Member(one, f"node-{one * nodes // WORLD}", one) for one in range(WORLD)]
    fsync = probes.os.fsync
    probes.os.fsync = lambda number: time.sleep(SLOW if rank == slow_writer else USUAL)
    links = Links(rank, members)
    for _ in range(times):
        found = probe(CPU, rank, members, links, Path(folder))
    links.close()
    probes.os.fsync = fsync
    dist.barrier()
    assert not list(Path(folder).iterdir())
    dist.barrier()
    assert summary(found, 1.0).startswith("probed in 1.0 s")
    slow = [outlier for outlier in outliers(found, members, 0.3) if "writing" in outlier.what]
    expected = [f"node-{slow_writer * nodes // WORLD}"] if slow_writer is not None and nodes > 1 else []
    assert [outlier.node for outlier in slow] == expected, slow
    return found


def test_every_rank_knows_what_all_have_measured(tmp_path: Path) -> None:
    by_rank = run_distributed(probed, WORLD, str(tmp_path))
    assert by_rank == [by_rank[0]] * WORLD
    for (nodes, *_), found in zip(CASES, by_rank[0], strict=True):
        for rank, rates in enumerate(found):
            assert rates.matmul > 1e6
            alone = [one * nodes // WORLD for one in range(WORLD)].count(rank * nodes // WORLD) == 1
            assert (rates.node is None) == alone
            assert (rates.pairs is None) == (nodes == 1)
            assert (rates.write is None) == (rank > 0 and rank * nodes // WORLD == (rank - 1) * nodes // WORLD)


def looked(slow: int) -> list[Finding | None]:
    """What each of 14 looks finds, while rank `slow` is slow from the third to the 13th."""
    rank, fastest = dist.get_rank(), probes.fastest
    members = [Member(one, f"node-{one}", one) for one in range(WORLD)]
    search = Stragglers(CPU, members, ratio=1.5)
    found = []
    for look in range(1, 15):
        late = rank == slow and 3 <= look <= 13
        stragglers.fastest = lambda *_, late=late: 0.02 if late else 0.01
        found.append(search.look(0.0))
    stragglers.fastest = fastest
    return found


def test_a_rank_that_is_slow_ten_times_in_a_row_is_named_once() -> None:
    told = run_distributed(looked, WORLD, 2)
    assert told == [told[0]] * WORLD
    first, *found = told[0]
    assert first is None
    named = {number: one.named for number, one in enumerate(found, start=2) if one.named}
    assert named == {
        13: "rank 2 on node-2 was the slowest at 10 logged steps in a row, 2.00 x the median of the others in computing"
    }
    assert found[5].scalars["slowest_over_median"] == 2.0 and found[5].scalars["slowest_rank"] == 2.0
    assert [number for number, one in enumerate(found, start=2) if "straggler" in one.scalars] == [13, 14]
