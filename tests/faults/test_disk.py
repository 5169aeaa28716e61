"""A full disk and a damaged checkpoint: nothing earlier is lost, the message says what to do, and doing it works."""

import os
import subprocess
from pathlib import Path

import pytest

from launch import rollback
from tests.faults.launched import TinyJob
from tests.faults.small_disk import small_disk

pytestmark = pytest.mark.faults


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_during_a_save_costs_no_earlier_checkpoint(tmp_path: Path, uninterrupted: TinyJob) -> None:
    one = size_of(uninterrupted.checkpoints / "step-00000009")
    tiny = TinyJob(tmp_path, cp=2, max_steps=9, checkpoint={"keep_last": 9, "save_interval": 3})
    with small_disk(tiny.run, int(1.6 * one)):
        with tiny.launch(2) as job:
            assert job.wait() == 1, job.output[-8000:]
            said = job.output
        assert f"saved {tiny.checkpoints}/step-00000003" in said
        warning = f"warning: checkpoint {tiny.checkpoints}/step-00000006 could not be written: rank "
        assert warning in said and "training goes on, earlier checkpoints are untouched" in said, said[-8000:]
        assert f"error: checkpoint {tiny.checkpoints}/step-00000009 could not be written: rank " in said
        assert "Traceback" not in said
        assert sorted(path.name for path in tiny.checkpoints.iterdir()) == ["step-00000003"]
        assert tiny.logged() == 9
        subprocess.run(["mount", "-o", f"remount,size={20 * one}", str(tiny.run)], check=True)
        assert "resumed from step 3, " in tiny.finish(2)
        assert tiny.complete() == [3, 6, 9]
        assert tiny.curve() == uninterrupted.curve()


def test_a_truncated_checkpoint_is_refused_and_the_offer_works(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, max_steps=3)
    with tiny.alone() as job:
        assert job.wait() == 0, job.output[-8000:]
    whole = tiny.curve()
    newest = tiny.checkpoints / "step-00000003"
    data = newest / "__0_0.distcp"
    size = data.stat().st_size
    os.truncate(data, size - 100)
    with tiny.alone() as job:
        assert job.wait() == 1, job.output[-8000:]
        assert (
            f"error: checkpoint {newest} is damaged: __0_0.distcp has {size - 100} bytes instead of {size}; "
            "go back to the newest sound one: python launch/rollback.py RUN --step 2\n"
        ) in job.output
        assert "Traceback" not in job.output
    assert rollback.main([str(tiny.run), "--step", "2"]) == 0
    with tiny.alone() as job:
        assert job.wait() == 0, job.output[-8000:]
        assert "resumed from step 2, " in job.output
    assert tiny.curve() == whole
