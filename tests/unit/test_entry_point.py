"""The command line of `launch/train.py` as far as a login node goes: no process group, no DeepSpeed, no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.train import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_check_takes_the_size_that_the_slurm_section_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--config", str(CONFIGS / "llama3-8b-128k.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--world_size is not given: 32 processes, slurm.nodes (4) x slurm.gpus_per_node (8)"
    assert lines[1] == "job llama3-8b-128k: valid on 32 processes"


def test_check_of_a_job_without_slurm_takes_one_replica(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "parallel.context_parallel_size=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "--world_size is not given: 8 processes, tensor_parallel_size (2) x context_parallel_size"
    )
    assert lines[1] == "job quickstart: valid on 8 processes"


def test_check_takes_the_given_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--world_size", "16", "--config", str(CONFIGS / "llama3-8b-8k-tp2.yaml")]) == 0
    assert capsys.readouterr().out.startswith("job llama3-8b-8k-tp2: valid on 16 processes\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--world_size", "6"], "world size (6) must be a multiple of tensor_parallel_size x context_parallel_size"),
        (["training.max_step=3"], "unknown key; did you mean training.max_steps?"),
        (["--config", "nowhere.yaml"], "cannot be read (No such file or directory)"),
        (["slurm.nodes=3", "slurm.gpus_per_node=1"], "world size (3) must be a multiple of"),
    ],
)
def test_a_job_that_cannot_run_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", *arguments]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and "valid on" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--world_size", "4"], "--world_size goes with --check"),
        (["--check", "--world_size", "0"], "--world_size (0) must be at least 1"),
    ],
)
def test_a_wrong_world_size_is_a_wrong_command(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
