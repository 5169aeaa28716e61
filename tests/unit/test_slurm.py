"""Slurm without a cluster: what is rendered and refused, when a job is queued again, and who is told of a busy run."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch import slurm_job, slurm_node, status, submit
from launch.config import load_job
from launch.health.health_folder import HealthFolder
from launch.health.pulse import PULSES
from launch.run_lock import RunBusy, RunDirectoryError, lock_run
from launch.sections.slurm import slurm_seconds
from launch.slurm.batch_script import render
from launch.slurm.submission import Submission
from launch.slurm.world import first_host, meeting_port, tasks_per_node, world_of_step
from tests.unit.job_files import weights_for

ROOT = Path(__file__).resolve().parents[2]


def blocks_of(language: str) -> list[str]:
    """Those of docs/slurm.md."""
    text = (ROOT / "docs" / "slurm.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LONG = ROOT / "configs" / "llama3-8b-128k.yaml"


def script(config: Path, *overrides: str) -> str:
    job = submit.checked(config, overrides)
    return render(job, folder=Path("/runs/x/slurm/now"), working_directory=Path("/work dir"), command=["run", "it now"])


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_jobs_are_rendered(config: Path, tmp_path: Path) -> None:
    overrides = ["slurm.gpus_per_node=4"] if config.stem == "quickstart" else weights_for(config, tmp_path)
    text, job = script(config, *overrides), load_job(config, overrides)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    lines = directives(text)
    assert f"--nodes={job.slurm.nodes}" in lines and f"--gres=gpu:{job.slurm.gpus_per_node}" in lines
    assert {
        "--ntasks-per-node=1",
        f"--signal=B:USR2@{job.slurm.stop_seconds}",
        "--requeue",
        "--exclusive",
        "--mem=0",
    } <= set(lines)
    # sbatch stops reading options at the first command
    assert max(index for index, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")) == len(lines)
    assert shlex.split(text.splitlines()[-1]) == ["exec", "run", "it now", "$@"]


def test_every_key_reaches_the_script() -> None:
    text = script(
        LONG,
        *("slurm.nodes=4", "slurm.gpus_per_node=8", "slurm.gres=gpu:h100", "slurm.partition=long", "slurm.account=me"),
        *("slurm.qos=low", "slurm.reservation=r1", "slurm.time=1-00:00:00", "slurm.constraint=ib&h100"),
        *("slurm.exclude=node[3,7-9]", "slurm.exclusive=false", "slurm.cpus_per_node=96", "slurm.memory=500G"),
        *("slurm.environment={NCCL_IB_HCA: 'mlx5_0,mlx5_1', A: \"it's $HOME\"}", "slurm.modules=[cuda/12.8]"),
        *("slurm.setup=[ulimit -l unlimited]", "slurm.sbatch_options=[--mail-type=END]", "slurm.stop_seconds=300"),
    )
    assert set(directives(text)) >= {
        *("--nodes=4", "--gres=gpu:h100:8", "--partition=long", "--account=me", "--qos=low", "--reservation=r1"),
        *("--time=1-00:00:00", "--constraint='ib&h100'", "--exclude='node[3,7-9]'", "--cpus-per-task=96"),
        *("--mem=500G", "--mail-type=END", "--signal=B:USR2@300", "--chdir='/work dir'"),
    }
    assert "--exclusive" not in directives(text)
    setup = text.partition("module load cuda/12.8\n")[2].partition("# Starts one")[0]
    shown = subprocess.run(["bash", "-c", f'{setup}printf "%s|%s" "$NCCL_IB_HCA" "$A"'], capture_output=True, text=True)
    assert shown.stdout == "mlx5_0,mlx5_1|it's $HOME"
    assert "ulimit -l unlimited" in setup


def test_a_job_on_cpus_asks_for_no_gpu() -> None:
    text = script(ROOT / "configs" / "quickstart.yaml", "slurm.gpus_per_node=4", "job.device=cpu")
    assert "gres" not in text


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "site.sh"
    template.write_text('#!/bin/bash -l\n{directives}\nx=${HOME}\n{setup}\n{command} "$@"\n')
    text = script(LONG, f"slurm.template={template}", "slurm.nodes=4")
    assert text.startswith("#!/bin/bash -l\n#SBATCH --job-name=") and "x=${HOME}\n" in text
    template.write_text("{directives}\n{command}\n")
    with pytest.raises(ValueError, match="lacks {setup}; it needs all of"):
        script(LONG, f"slurm.template={template}", "slurm.nodes=4")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("2-12", 216000), ("1-00:30", 88200), ("1-02:03:04", 93784)],
)
def test_time_limits_read_as_sbatch_does(limit: str, seconds: int) -> None:
    assert slurm_seconds(limit) == seconds


def test_bad_jobs_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    assert submit.main([quickstart, "slurm.gpus_per_node=6"]) == 2
    assert "world size (6) must be a multiple of" in capsys.readouterr().err
    assert submit.main([quickstart, "slurm.gpus_per_node=4", "slurm.time=2", "slurm.stop_seconds=120"]) == 2
    assert "stop_seconds (120) must be less than the time limit (2, 120 s)" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main([quickstart, "slurm.gpus_per_node=4"]) == 1
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert submit.main([quickstart, "slurm.gpus_per_node=4", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=quickstart\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for Slurm's commands, which note how they were called; sbatch counts up from 7."""
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {
        "sbatch": 'n=$(($(wc -l < "$CALLS") + 6)); [ $n -lt 20 ] || { echo "Invalid account" >&2; exit 1; }; echo $n',
        "scontrol": 'if [ "$1 $2" = "show job" ]; then '
        'echo "JobId=7 JobState=$STATE Reason=None Restarts=2 PreemptTime=$PREEMPTED ExcNodeList=node-3"; '
        "else echo node-1; fi",
        "srun": "exit $SRUN_STATUS",
        "scancel": "true",
    }
    for name, answer in answers.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{answer}\n')
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    variables = {"CALLS": calls, "STATE": "RUNNING", "PREEMPTED": "None", "SRUN_STATUS": 0, "SLURM_JOB_ID": 7}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-1")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_job, "_SECONDS_TO_BE_KILLED", 0)
    handlers = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)]
    yield calls
    for number, handler in zip((signal.SIGUSR2, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def submitted(*overrides: str, chain: int = 1) -> Submission:
    job = submit.checked(ROOT / "configs" / "quickstart.yaml", ["slurm.gpus_per_node=4", *overrides])
    folder = submit._new_folder(job)
    return submit.submit(job, folder, submit._script(job, folder), chain)


def test_a_submission_is_kept_with_the_run(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = submitted(chain=3)
    assert made.job_ids == (7, 8, 9) and Submission.read(made.folder) == made
    first, second, third = slurm.read_text().splitlines()
    assert first.endswith("job.sbatch --followed") and "--dependency" not in first
    assert "--dependency=afterok:7 --kill-on-invalid-dep=yes" in second and second.endswith("--followed")
    assert "--dependency=afterok:8" in third and not third.endswith("--followed")
    assert load_job(made.config, [], 4).job.name == "quickstart"
    assert status.main(["runs/quickstart"]) == 0
    told = capsys.readouterr().out
    assert "job 7        RUNNING, restarts 2" in told and "step         0 of 200" in told
    assert status.main(["runs"]) == 2


def test_what_a_crash_or_a_hand_has_damaged_is_told_or_left_out(
    slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = submitted()
    made.note_start(step=0, nodes=["node-1"], job="7", restart=0)
    with open(made.folder / "slices.jsonl", "a") as file:
        file.write('{"time": "2026-1')
    (made.run / "metrics.jsonl").write_bytes(b'[1]\n{"step": 3, "loss": 1.5}\n{"step": 4, "lo\xff\n')
    assert [start["step"] for start in made.slices()] == [0] and made.idle_slices(0) == 1
    assert status.main(["runs/quickstart"]) == 0
    assert "step         3 of 200" in capsys.readouterr().out
    (made.folder / "submission.json").write_text("{}")
    assert status.main(["runs/quickstart"]) == 2
    assert "submission.json is not what launch/submit.py wrote (KeyError('srun_options'))" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "job"), [("Welcome to the cluster\n77;main", 77), ("Submitted batch job 77", None)])
def test_what_sbatch_says_beside_the_id(slurm: Path, answer: str, job: int | None) -> None:
    program = slurm.parent / "bin" / "sbatch"
    program.write_text(f"#!/bin/bash\nprintf {shlex.quote(answer)}\n")
    if job is not None:
        assert submitted().job_ids == (job,)
        return
    with pytest.raises(submit.SubmitError, match="the job may be queued; look with squeue"):
        submitted()
    assert list(Path("runs/quickstart/slurm").glob("*/job.sbatch")), "a job that is queued needs it"


def test_a_refused_submission_leaves_nothing(slurm: Path) -> None:
    slurm.write_text("x\n" * 12)
    with pytest.raises(submit.SubmitError, match="sbatch refused the job: Invalid account"):
        submitted(chain=3)
    assert "scancel 19" in slurm.read_text()
    assert not list(Path("runs/quickstart/slurm").iterdir())


def slice_of(made: Submission, monkeypatch: pytest.MonkeyPatch, *, restart: int = 0, saves: int = 0) -> int:
    """One start of a job that saves at step `saves` and then ends."""
    if saves:
        (Path(made.working_directory) / made.checkpoint_location / f"step-{saves:08d}").mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    return slurm_job.main([str(made.folder)])


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


def test_starts_without_progress_count_anew_when_other_nodes_are_avoided(slurm: Path) -> None:
    made = submitted()
    for excluded in ([], [], ["node-4"]):
        made.note_start(step=5, excluded=excluded)
    assert made.idle_slices(5) == 1
    made.note_start(step=5, excluded=["node-4"])
    assert made.idle_slices(5) == 2 and made.idle_slices(6) == 0


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


def test_half_a_line_of_a_crash_is_no_start(slurm: Path) -> None:
    made = submitted()
    made.note_start(step=5)
    with open(made.folder / "slices.jsonl", "a") as file:
        file.write('{"time": "2026-11')
    made.note_start(step=5)
    assert [start["step"] for start in made.slices()] == [5, 5] and made.idle_slices(5) == 2


LAUNCHER = """
import os, subprocess, sys, time
ranks = [subprocess.Popen(["sleep", "1000"], env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
if sys.argv[1] == "sleeps":
    time.sleep(60)
    sys.exit(1)
status = ranks[1].wait()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
sys.exit(status)
"""
"""Asks how rank 1 ended at once, and ends when that has been looked for, or much later."""


@pytest.mark.parametrize("asks", [False, True])
def test_a_killed_rank_is_told_at_once_and_for_what_it_was(
    slurm: Path, asks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its node is the first to speak: the others lose their connections to that rank at the same moment. Where
    the launcher has asked before the node looked, it knows how the rank ended."""
    looked = slurm.parent / "looked"
    launcher = [sys.executable, "-c", LAUNCHER, "asks" if asks else "sleeps", str(looked)]
    monkeypatch.setattr(slurm_node.Node, "_launcher", lambda *_: launcher)
    monkeypatch.setattr(slurm_node, "_WAIT_FOR_THE_CULPRIT", 60.0)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv(PULSES, "")
    node = slurm_node.Node(["node-1"], 0, 2, slurm.parent, slurm.parent / "health" / "7-0")
    watch = node._watch

    def strike(launcher: int) -> None:
        """Between two looks, once both are there."""
        watch(launcher)
        if len(node._ranks) == 2 and not node._ended:
            victim = next(pid for pid, rank in node._ranks.items() if rank == 1)
            os.kill(victim, signal.SIGKILL)
            while asks and Path(f"/proc/{victim}").exists():
                time.sleep(0.01)
            watch(launcher)
            looked.touch()

    monkeypatch.setattr(node, "_watch", strike)
    assert node.run([], 1) == (256 - signal.SIGKILL if asks else 128 + signal.SIGKILL)
    assert re.search(r"^rank 1 on \S+ was killed by signal 9 \(SIGKILL\); ", capsys.readouterr().out, re.MULTILINE)
    assert slurm.read_text().splitlines()[-1] == "scancel --signal=KILL 7.0"


def test_gpus_are_those_that_slurm_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    node = slurm_node.Node(["a", "b"], 1, 2, tmp_path, tmp_path / "health" / "7-0")
    (world,) = (word.partition("=")[2] for word in node._launcher([], 1) if word.startswith("--world_info"))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"a": [0, 1], "b": ["4", "5"]}


def test_ranks_that_srun_starts_know_their_world() -> None:
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_STEP_TASKS_PER_NODE": "4,3",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
    }
    world = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_SIZE": "3", "MASTER_ADDR": "gpu07"}
    assert world_of_step(step) == world | {"MASTER_PORT": str(meeting_port(7, 0))}
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert world_of_step(step | own) == world | own
    assert world_of_step(step | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty
    assert world_of_step({key: value for key, value in step.items() if key != "SLURM_STEP_ID"}) is None  # a job script
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node-1", "node-1"), ("a[07-12,20],b3", "a07"), ("a3,b[1-2]", "a3"), ("r[1-2]n4-ib,x", "r1n4-ib")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


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


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from launch.run_lock import lock_run; f = lock_run(Path({str(tmp_path)!r})); "
    code += "print('locked', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(RunBusy, match=rf"in use by .*process {holder.pid} on "):
        lock_run(tmp_path, patience=0.1)
    holder.kill()
    holder.wait()
    held = lock_run(tmp_path, patience=5)
    assert held is not None and f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    held.close()


@pytest.mark.parametrize("place", ["file", "file/run", "locked"])
def test_a_run_directory_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked" / "lock").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=rf"{place} cannot be written \(.*give job.run_directory another place"):
        lock_run(tmp_path / place)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("launch.run_lock.fcntl.lockf", refuse)
    assert lock_run(tmp_path) is None
    assert (
        f"{tmp_path} is on a file system without locks (No locks available): start no second job"
        in capsys.readouterr().out
    )


def test_a_signal_asks_a_second_interrupt_ends_and_a_forked_child_hears_neither() -> None:
    code = """
        import os, signal, time
        from launch.environment import Place
        from launch.stopping import StopRequests
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # both as a rank under Slurm inherits it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        stop = StopRequests(Place(0, 0, 1, 1))
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            os.write(tell, b"x")
            time.sleep(600)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR2)
        deadline = time.monotonic() + 60
        while not stop():
            assert time.monotonic() < deadline
        print("asked", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    once = "interrupted: stopping after this step, with a checkpoint; once more ends it at once"
    assert ended.stdout.splitlines() == ["asked", once] and ended.returncode == 128 + signal.SIGINT, ended.stderr
