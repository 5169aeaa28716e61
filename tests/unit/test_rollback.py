"""A run goes back to an earlier checkpoint: newer ones are set aside, and a run that trains is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import rollback
from launch.saving.checkpoint_names import complete_steps, step_name
from launch.saving.manifest import encode
from launch.saving.storage import storage_at
from tests.faults.launched import TinyJob
from tests.unit.commands import run_in
from tests.unit.job_files import load

STEPS = [100, 150, 200, 250]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that was moved, with checkpoints of some bytes."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(load(tmp_path, "job.run_directory=where/it/was").to_yaml())
    (run / "metrics.jsonl").write_text('{"step": 250, "loss": 9.0}\n')
    storage = storage_at(str(run / "checkpoints"))
    for step in STEPS:
        storage.begin(step_name(step))
        storage.complete(step_name(step), encode({"format": 2, "progress": {"step": step}, "files": {}}))
    return run


def taken_back(run: Path, step: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = rollback.main([str(run), "--step", str(step)])
    said = capsys.readouterr()
    return status, said.out + said.err


def known(run: Path) -> list[int]:
    return complete_steps(storage_at(str(run / "checkpoints")))


def test_newer_checkpoints_and_metrics_are_kept_aside(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(["20261123-101112", "20261123-101113"])
    monkeypatch.setattr(time, "strftime", lambda _format: next(times))
    whole = {path.name: (path / "manifest.json").read_bytes() for path in (run / "checkpoints").iterdir()}
    status, said = taken_back(run, 150, capsys)
    aside = run / "checkpoints" / "set-aside-20261123-101112"
    assert (status, said) == (
        0,
        f"the next start of {run} continues from step-00000150; 2 newer checkpoints (step-00000200, step-00000250) "
        f"set aside in {aside}\n",
    )
    assert known(run) == [100, 150] and complete_steps(storage_at(str(aside))) == [200, 250]
    assert all((aside / name / "manifest.json").read_bytes() == whole[name] for name in map(step_name, (200, 250)))
    assert (run / "metrics-20261123-101112.jsonl").read_text() == '{"step": 250, "loss": 9.0}\n'
    assert (run / "metrics.jsonl").exists(), "the next start cuts it, as at every resume"
    assert taken_back(run, 150, capsys) == (
        0,
        f"step-00000150 is the newest checkpoint of {run} already: nothing was changed\n",
    )
    assert taken_back(run, 100, capsys)[0] == 0 and known(run) == [100]
    assert complete_steps(storage_at(str(aside))) == [200, 250], "those set aside before stay where they are"


def test_what_cannot_be_taken_back_is_left_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = taken_back(run, 120, capsys)
    assert status == 2 and "holds no checkpoint of step 120; there are those of 100, 150, 200, 250" in said
    status, said = taken_back(run.parent, 100, capsys)
    assert status == 2 and "give the directory of a run that has begun" in said
    assert not (run.parent / "lock").exists()
    (run / "checkpoints" / "step-00000150" / "manifest.json").write_text("{}")
    status, said = taken_back(run, 150, capsys)
    assert status == 2 and "checkpoint step-00000150 in " in said and "is damaged: " in said
    assert known(run) == STEPS and [*run.glob("metrics-*")] == []


def test_a_run_that_trains_is_not_taken_back(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback.lock_run, "__defaults__", (0.0,))
    holding = f"from pathlib import Path; from launch.run_lock import lock_run; f = lock_run(Path({str(run)!r}))"
    command = [sys.executable, "-c", f"{holding}; print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as training:
        assert training.stdout and training.stdout.readline()
        status, said = taken_back(run, 100, capsys)
        training.communicate(b"\n")
    assert status == 2 and f"error: run directory {run} is in use by process {training.pid} on " in said
    assert known(run) == STEPS


def test_a_move_that_fails_leaves_the_oldest_and_can_be_repeated(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, done = Path.rename, []

    def breaks(self: Path, target: Path) -> Path:
        if done:
            raise OSError(5, "Input/output error")
        done.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", breaks)
    status, said = taken_back(run, 100, capsys)
    assert (status, done, known(run)) == (2, ["step-00000250"], [100, 150, 200]) and "Input/output error" in said
    monkeypatch.setattr(Path, "rename", rename)
    assert taken_back(run, 100, capsys)[0] == 0 and known(run) == [100]
    aside = {path.parent.name: path for path in (run / "checkpoints").glob("set-aside-*/step-*/manifest.json")}
    assert sorted(aside) == [step_name(step) for step in (150, 200, 250)]


def test_a_run_goes_back_and_skips_the_data_of_a_spike(tmp_path: Path) -> None:
    """Back to step 4 of 8 without steps 5 and 6: every number is that of a run that skipped them from its start."""
    tiny = TinyJob(tmp_path / "spike", max_steps=8, checkpoint={"save_interval": 2, "keep_last": 9})
    command, skip = ["--config", str(tiny.config)], "training.skip_steps=[[5, 6]]"
    run_in(tiny.folder, "train", command)
    spiked = tiny.curve()
    record = tiny.run / "data" / "dp-00000.jsonl"
    read = record.read_text().splitlines()
    refused = run_in(tiny.folder, "train", [*command, "training.max_steps=9", skip], status=1)
    assert (
        "error: training.skip_steps left out no step up to step 8 and leaves out steps 5 to 6 of them now; " in refused
    )
    assert tiny.curve() == spiked and tiny.complete() == [2, 4, 6, 8]

    run_in(tiny.folder, "rollback", [str(tiny.run), "--step", "4"])
    said = run_in(tiny.folder, "train", [*command, skip])
    assert "resumed from step 4, " in said and "steps 5 to 6 will be skipped, as training.skip_steps says\n" in said
    assert tiny.complete() == [2, 4, 8]
    again = tiny.curve()
    assert [*again] == [1, 2, 3, 4, 7, 8] and all(again[step] == spiked[step] for step in range(1, 5))
    assert again[7] != spiked[7]
    assert record.read_text().splitlines() == [*read[:4], *read[6:]], "step 7 reads what it read"
    [kept] = tiny.run.glob("metrics-*.jsonl")
    assert [json.loads(line)["step"] for line in kept.read_text().splitlines() if '"loss"' in line] == [*range(1, 9)]
    assert "nothing was lost but the steps skipped" in run_in(tiny.folder, "audit_data", [str(tiny.run)])

    whole = TinyJob(tmp_path / "whole", max_steps=8)
    run_in(whole.folder, "train", ["--config", str(whole.config), skip])
    assert whole.curve() == again and whole.validation() == tiny.validation()
