"""kill -9 of one rank at chosen moments: all ranks end, and the same command continues bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import Forked
from tests.faults.launched import Launched, TinyJob

pytestmark = pytest.mark.faults

SECONDS_TO_DIE = 300.0
"""The launcher looks once a second and gives a rank half a minute to obey; a lost collective would wait for longer."""

CHAIN: list[tuple[str, dict[str, Any], list[int]]] = [
    ("before the ranks have met", {"rank": 1, "event": "import", "path": "deepspeed"}, []),
    ("after they have met", {"rank": 0, "event": "open", "path": "run/config.yaml"}, []),
    ("before a save begins", {"rank": 0, "event": "os.mkdir", "path": "step-00000001.partial"}, []),
    ("while one rank writes", {"rank": 1, "event": "open", "path": "step-00000001.partial/__1_0.distcp"}, []),
    ("while the other writes", {"rank": 0, "event": "open", "path": "step-00000002.partial/__0_0.distcp"}, [1]),
    ("before torch's metadata", {"rank": 0, "event": "open", "path": "step-00000003.partial/.metadata"}, [1, 2]),
    ("before the manifest", {"rank": 0, "event": "open", "path": "step-00000004.partial/manifest.json"}, [2, 3]),
    ("before the last rename", {"rank": 0, "event": "os.rename", "path": "step-00000005.partial"}, [3, 4]),
    ("before an old one is removed", {"rank": 0, "event": "os.rename", "path": "step-00000004"}, [4, 5, 6]),
    ("while an old one is removed", {"rank": 0, "event": "shutil.rmtree", "path": "step-00000006.partial"}, [7, 8]),
]
"""One run is killed again and again: when, where exactly, and the complete checkpoints that this must leave."""
LAUNCHED = 4
"""So many are started by the launcher, which has to end the other rank; later it is the same to it where a save is."""


def assert_all_ranks_end(job: Launched) -> float:
    """Seconds until no process of a job that has just lost a rank is left."""
    seconds = job.seconds_to_die()
    assert job.wait() != 0
    assert seconds < SECONDS_TO_DIE, job.output[-8000:]
    return seconds


def sums(job: TinyJob, step: int) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of each file of a checkpoint."""
    manifest = json.loads((job.checkpoints / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry for name, entry in manifest["files"].items() if name.endswith(".distcp")}


def test_killed_at_every_point_of_start_and_save(tmp_path: Path, uninterrupted: TinyJob) -> None:
    tiny = TinyJob(tmp_path, cp=2, max_steps=9, checkpoint={"keep_last": 2})
    for number, (when, fault, complete) in enumerate(CHAIN):
        resumed_from, strike = max(tiny.complete(), default=0), fault | {"action": "kill"}
        with tiny.launch(2, fault=strike) if number < LAUNCHED else Forked(tiny, 2, fault=strike) as job:
            job.until_said(f"fault: rank {fault['rank']}")
            if isinstance(job, Launched):
                print(f"{when}: all gone after {assert_all_ranks_end(job):.1f} s")
            else:
                job.lose([fault["rank"]], noticed_after=0.5)
            if resumed_from:
                assert f"resumed from step {resumed_from}, " in job.output, when
            assert tiny.complete() == complete, (when, job.output[-4000:])
    tiny.finish(2)
    assert tiny.curve() == uninterrupted.curve()
    assert sorted(tiny.curve()) == list(range(1, 10))
    assert tiny.validation() == uninterrupted.validation()
    assert sums(tiny, 9) == sums(uninterrupted, 9)
    assert sorted(path.name for path in tiny.checkpoints.iterdir()) == ["step-00000008", "step-00000009"]


def test_an_exception_on_one_rank_ends_the_others(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, cp=2, max_steps=9)
    fault = {"rank": 1, "event": "open", "path": "text/0.txt", "action": "raise"}
    with tiny.launch(2, fault=fault) as job:
        job.until_said("fault: rank 1")
        seconds = assert_all_ranks_end(job)
        print(f"all gone after {seconds:.1f} s")
        assert "RuntimeError: a fault of one rank alone" in job.output
