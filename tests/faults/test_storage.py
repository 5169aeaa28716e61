"""Storage that is lost, locked or slow while a job trains: what is told, what it costs, and that the job can go on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.saving.manifest import encode, read_manifest
from launch.saving.storage import storage_at
from tests.faults.forked import Forked
from tests.faults.launched import TinyJob
from tests.faults.small_disk import small_disk

pytestmark = pytest.mark.faults


def train(tiny: TinyJob, processes: int, *overrides: str, fault: Any = None) -> tuple[int, str]:
    """Exit status and output."""
    with Forked(tiny, processes, *overrides, fault=fault) as job:
        status = job.wait()
        assert "Traceback" not in job.output, job.output[-8000:]
        return status, job.output


def at(event: str, path: str, command: str, rank: int = 0) -> dict[str, Any]:
    return {"rank": rank, "event": event, "path": path, "action": "run", "command": command}


def lose_and_repair(tiny: TinyJob, uninterrupted: TinyJob, lose: str, reason: str, repair: str, mode: str) -> None:
    """From its second save on the job cannot write; once that is repaired, it goes on from the first."""
    fault = at("os.mkdir", "step-00000002.partial", lose)
    status, said = train(tiny, 2, f"checkpoint.on_save_error={mode}", fault=fault)
    assert status == 1, said[-8000:]
    failed = {step: f"checkpoint {tiny.checkpoints}/step-{step:08d} could not be written: rank 0: " for step in (2, 9)}
    if mode == "warn":
        assert f"warning: {failed[2]}{reason}" in said and f"error: {failed[9]}{reason}" in said, said[-8000:]
        assert tiny.logged() == 9
    else:
        assert f"error: {failed[2]}{reason}" in said and "warning" not in said, said[-8000:]
        assert tiny.logged() < 9
    subprocess.run(["sh", "-c", repair], check=True)
    assert tiny.complete() == [1], "what was saved before is there still"
    status, said = train(tiny, 2)
    assert status == 0 and "resumed from step 1, " in said, said[-8000:]
    assert tiny.curve() == uninterrupted.curve()


@pytest.mark.parametrize("mode", ["warn", "stop"])
def test_a_file_in_place_of_the_directory(tmp_path: Path, uninterrupted: TinyJob, mode: str) -> None:
    tiny = TinyJob(tmp_path, cp=2, max_steps=9, checkpoint={"keep_last": 9})
    place = tiny.checkpoints
    lose, repair = f"mv {place} {place}.away; touch {place}", f"rm {place}; mv {place}.away {place}"
    lose_and_repair(tiny, uninterrupted, lose, "[Errno 20] Not a directory: ", repair, mode)


def test_a_directory_that_turns_read_only(tmp_path: Path, uninterrupted: TinyJob) -> None:
    tiny = TinyJob(tmp_path, cp=2, max_steps=9, checkpoint={"keep_last": 9})
    remount = f"mount -o remount,%s {tiny.checkpoints}"
    with small_disk(tiny.checkpoints, 1 << 25):
        lose_and_repair(
            tiny, uninterrupted, remount % "ro", "[Errno 30] Read-only file system: ", remount % "rw", "warn"
        )


def test_a_directory_removed_while_a_rank_writes(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, cp=2, max_steps=6, checkpoint={"keep_last": 9})
    fault = at("open", "step-00000003.partial/__1_0.distcp", f"rm -r {tiny.checkpoints}", rank=1)
    status, said = train(tiny, 2, fault=fault)
    lost = f"warning: checkpoint {tiny.checkpoints}/step-00000003 could not be written: rank "
    assert status == 0 and lost in said and "No such file or directory" in said, said[-8000:]
    assert tiny.complete() == [4, 5, 6], "the next save makes the directory again"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_waits_for_slow_storage_only_where_it_writes_itself(tmp_path: Path, asynchronous: bool) -> None:
    """`seconds_checkpoint` of the step after a save: the second that the storage takes, or not. In the background the
    storage takes until that step is logged."""
    tiny = TinyJob(tmp_path, checkpoint={"save_interval": 3})
    until_logged = f"until grep -q '\"step\": 4,' {tiny.run}/metrics.jsonl; do sleep 0.05; done"
    fault = at("open", "step-00000003.partial/manifest.json", until_logged if asynchronous else "sleep 1")
    status, said = train(tiny, 1, f"checkpoint.asynchronous={str(asynchronous).lower()}", fault=fault)
    assert status == 0 and tiny.complete() == [3, 6], said[-8000:]
    waited = {}
    for line in (tiny.run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "seconds_checkpoint" in entry:
            waited[entry["step"]] = entry["seconds_checkpoint"]
    assert waited.keys() == {4}, "the only step that is logged after a save"
    assert waited[4] > 0 if asynchronous else waited[4] >= 1


def test_a_checkpoint_of_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    tiny = TinyJob(tmp_path, max_steps=2)
    assert train(tiny, 1)[0] == 0
    status, said = train(tiny, 1, "model.num_hidden_layers=3", "model.qk_norm=true", "training.max_steps=4")
    refusal = f"error: checkpoint {tiny.checkpoints}/step-00000002 is of another model: "
    assert status == 1 and refusal in said, said[-8000:]
    for difference in ("model.num_hidden_layers is 2 there and 3 here", "model.qk_norm is False there and True here"):
        assert difference in said
    assert "give this model another job.name" in said and "accept_changes" not in said
    words = (tmp_path / "text" / "0.txt").read_text()
    (tmp_path / "text" / "0.txt").write_text("other words, and fewer")
    status, said = train(tiny, 1, "training.max_steps=4")
    assert status == 1 and "error: the run was trained on other data (corpus files: fingerprint " in said, said[-8000:]
    (tmp_path / "text" / "0.txt").write_text(words)
    # The same corpus in another order, as another version of the program might read it.
    manifest = tiny.checkpoints / "step-00000002" / "manifest.json"
    content = read_manifest(storage_at(str(tiny.checkpoints)), "step-00000002")
    manifest.write_bytes(encode({**content, "next_batches": content["next_batches"] | {"2": "0" * 32}}))
    status, said = train(tiny, 1, "training.max_steps=4")
    refusal = f"error: checkpoint {tiny.checkpoints}/step-00000002 would go on with other data: the batch of step 3 has"
    assert status == 1 and f"{refusal} hash 000000000000 there and " in said, said[-8000:]
    assert tiny.complete() == [1, 2] and tiny.logged() == 2
