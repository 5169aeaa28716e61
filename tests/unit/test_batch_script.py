"""From a job's file to its batch script: what is rendered, and what is refused before anything is written."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from launch import submit
from launch.config import load_job
from launch.sections.slurm import slurm_seconds
from launch.slurm.batch_script import render
from tests.unit.job_files import weights_for

ROOT = Path(__file__).resolve().parents[2]
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
    template.write_bytes(b"#!/bin/bash \xff")
    with pytest.raises(ValueError, match=r"slurm.template .*site.sh is not UTF-8 text \(byte 12\); save it as UTF-8"):
        script(LONG, f"slurm.template={template}", "slurm.nodes=4")


def test_a_percent_sign_in_a_folder_is_none_of_sbatchs_patterns() -> None:
    job = load_job(LONG, ["slurm.nodes=4"])
    lines = directives(render(job, folder=Path("/runs/at%j"), working_directory=Path("/"), command=["run"]))
    assert "--output=/runs/at%%j/job-%j.log" in lines


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
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n#SBATCH --job-name=quickstart\n") and not said.err
    assert (
        submit.main(
            [quickstart, "slurm.gpus_per_node=4", "slurm.max_restarts=0", "slurm.max_idle_slices=5", "--dry-run"]
        )
        == 0
    )
    assert capsys.readouterr().err.startswith("warning: slurm.max_idle_slices = 5 does nothing: max_restarts (0)")
    assert not list(tmp_path.iterdir())
