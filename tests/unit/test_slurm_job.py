"""One start of a job: when it is queued again, how a warning reaches its ranks, and what its step is started with."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from launch import slurm_job, status
from launch.health.health_folder import HealthFolder
from launch.slurm.submission import Submission
from tests.unit.slurm_stand_ins import slice_of, submitted

ROOT = Path(__file__).resolve().parents[2]


def blocks_of(language: str) -> list[str]:
    """Those of docs/slurm.md."""
    text = (ROOT / "docs" / "slurm.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_a_job_is_queued_again_while_it_makes_progress(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted()
    for restart, (told, requeues) in enumerate([("queueing job 7 again", 1), ("2 starts from step 0", 1)]):
        slice_of(made, monkeypatch, restart=restart)
        assert told in capsys.readouterr().out and slurm.read_text().count("scontrol requeue 7") == requeues
    made.note_start(step=10)
    slice_of(made, monkeypatch, saves=40)
    assert slurm.read_text().count("scontrol requeue 7") == 2
    assert slice_of(made, monkeypatch, restart=20, saves=60) == 1
    assert "restarted 20 times of slurm.max_restarts (20)" in capsys.readouterr().out
    assert slice_of(made, monkeypatch, saves=200) == 0
    assert "job 7 is done: step 200 of 200" in capsys.readouterr().out


def test_a_job_is_queued_again_though_the_disk_under_its_log_is_full(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = submitted()
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr(sys, "stdout", full)
        slice_of(made, monkeypatch)
    assert slurm.read_text().count("scontrol requeue 7") == 1


def test_a_cancelled_and_a_failed_job_are_not_queued_again(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted()
    monkeypatch.setenv("STATE", "CANCELLED")
    assert slice_of(made, monkeypatch, saves=5) == 1
    assert "not queued again: Slurm has it as CANCELLED" in capsys.readouterr().out
    monkeypatch.setenv("STATE", "RUNNING")
    monkeypatch.setenv("SRUN_STATUS", "3")
    assert slice_of(made, monkeypatch, saves=6) == 3
    assert "requeue" not in slurm.read_text()


def test_a_job_that_hung_is_queued_again_without_the_nodes_to_blame(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted("health.exclude=true", "slurm.max_idle_slices=1")
    folder = HealthFolder(made.run, "7-0")
    folder.make()
    folder.write_suspects(["node-4", "node-5"])
    folder.write("verdict-0.txt", "hang")
    monkeypatch.setenv("SRUN_STATUS", "76")
    ended: list[int] = []
    monkeypatch.setattr(slurm_job.os, "kill", lambda pid, number: ended.append(number))
    slice_of(made, monkeypatch, saves=5)
    before = capsys.readouterr().out
    requeue, update = slurm.read_text().splitlines()[-2:]
    assert requeue == "scontrol requeue 7" and update == "scontrol update JobId=7 ExcNodeList=node-3,node-4,node-5"
    assert status.main([str(made.run)]) == 0
    asked = capsys.readouterr().out
    assert f"hung         {folder.path}/verdict-0.txt" in asked and "avoided      node-3" in asked
    assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    told = before + asked
    assert "job 7 hung, and stopped at step 5 of 200" in told
    assert "queueing job 7 again, without node-4 node-5" in told


def test_a_death_long_after_a_hang_that_was_only_told_is_none_of_it(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted("health.on_hang=report")
    folder = HealthFolder(made.run, "7-0")
    folder.make()
    folder.write("verdict-0.txt", "hang")
    monkeypatch.setenv("SRUN_STATUS", "3")
    assert slice_of(made, monkeypatch, saves=5) == 3
    assert "job 7 failed, exit status 3" in capsys.readouterr().out and "requeue" not in slurm.read_text()


def warned_slice(made: Submission, srun: str, programs: Path) -> None:
    """Trains with a stand-in for the step that warns the job as it begins; what follows is of bash."""
    (programs / "srun").write_text(f"#!/bin/bash\nkill -USR2 $PPID\n{srun}")
    slurm_job.Slice(made, slurm_job.StopSignals())._train(["node-1"])


PASSED_ON = 'for _ in {1..600}; do if grep -q "^scancel" "$CALLS"; then break; fi; sleep 0.1; done'
"""The step does not end before it has been told to."""


def test_a_warning_waits_until_every_node_expects_it(slurm: Path) -> None:
    """It comes before there is a step; the node is ready half a second later."""
    made = submitted("training.max_steps=300")
    expects = f'sleep 0.5\necho ready >> "$CALLS"\ntouch {made.folder}/7-0/ready-0\n'
    warned_slice(made, f"{expects}{PASSED_ON}\n", slurm.parent / "bin")
    assert slurm.read_text().splitlines()[-2:] == ["ready", "scancel --signal=USR2 7"]


def test_a_warning_is_passed_on_until_slurm_takes_it(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_job, "_PASS_ON_SECONDS", 0.01)
    programs = slurm.parent / "bin"
    refuses = '#!/bin/bash\nif [ -e {0}.refused ]; then echo "scancel $*" >> {0}; else touch {0}.refused; exit 1; fi\n'
    (programs / "scancel").write_text(refuses.format(slurm))
    made = submitted("training.max_steps=300")
    warned_slice(made, f"touch {made.folder}/7-0/ready-0\n{PASSED_ON}\nsleep 0.5\n", programs)
    assert slurm.read_text().count("scancel --signal=USR2 7") == 1


def test_a_preemption_that_came_before_it_could_be_heard_is_noticed(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREEMPTED", "2026-11-23T06:22:10")
    slice_of(submitted(), monkeypatch, saves=5)
    told = capsys.readouterr().out
    assert "preempted before this process could hear it: asking all ranks to save and stop" in told
    assert "job 7 was stopped at step 5 of 200" in told and "queueing job 7 again" in told
    assert "srun" not in slurm.read_text()


def test_a_controller_that_is_away_costs_no_job(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not answer to the first of each kind of question."""
    monkeypatch.setattr(slurm_job, "_ASK_SECONDS", 0.01)
    away = (
        'mark="$CALLS.$1"; if [ "$2" != hostnames ] && [ ! -e "$mark" ]; then touch "$mark"; '
        'echo "slurm_x error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi\n'
    )
    scontrol = slurm.parent / "bin" / "scontrol"
    shebang, _, rest = scontrol.read_text().partition("\n")
    scontrol.write_text(f"{shebang}\n{away}{rest}")
    slice_of(submitted(), monkeypatch, saves=5)
    told = capsys.readouterr().out
    assert told.count("Unable to contact slurm controller") == 2 and "queueing job 7 again" in told
    assert slurm.read_text().count("scontrol requeue 7") == 1


@pytest.mark.parametrize("block", blocks_of("yaml"))
def test_the_containers_of_the_documentation_reach_the_nodes(
    slurm: Path, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load(block)["slurm"]
    made = submitted(*(f"slurm.{key}={json.dumps(value)}" for key, value in settings.items()))
    slice_of(made, monkeypatch, saves=200)
    (called,) = [line for line in slurm.read_text().splitlines() if line.startswith("srun ")]
    words = called.split()
    node = next(number for number, word in enumerate(words) if word.endswith("slurm_node.py"))
    before = " ".join(words[: node - 2])
    if "container" in settings:
        assert before.endswith(settings["container"])
    for option in settings.get("srun_options", []):
        assert option in before
    assert words[node - 2] == settings["python"]
    script = (made.folder / "job.sbatch").read_text()
    assert f"exec {settings['python']} -u " in script
