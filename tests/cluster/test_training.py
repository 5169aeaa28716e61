"""The main job on two nodes computes what it computes on one, by each road into the launcher."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.config import load_job
from tests.cluster.two_nodes import Finished, TwoNodes

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SHORT = [
    f"training.max_steps={STEPS}",
    "training.evaluation_batches=1",
    "training.sample_tokens=8",
    "optimizer.warmup_steps=2",
    "monitor.log_interval=1",
]
SECONDS = 240


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages whose quickstart is short, so that the command that trains it needs no argument."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("launch", "model", "parallel", "configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    quickstart = folder / "configs" / "quickstart.yaml"
    quickstart.write_text(load_job(quickstart, SHORT).to_yaml())
    return folder


@pytest.fixture(scope="module")
def nodes(_nodes_can_be_made: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with TwoNodes(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def one_node(nodes: TwoNodes, checkout: Path) -> list[dict[str, float]]:
    """What four processes on node-a log, started from `/`, where nothing but an installation finds the packages."""
    train, config = checkout / "launch" / "train.py", checkout / "configs" / "quickstart.yaml"
    run = checkout / "runs" / "one-node"
    command = ["deepspeed", "--num_gpus", "4", str(train), "--config", str(config), f"job.run_directory={run}"]
    finished = nodes.run(command, cwd=Path("/"), timeout=SECONDS)
    assert finished.returncode == 0, finished.output[-8000:]
    return curve(run)


def curve(run: Path) -> list[dict[str, float]]:
    """Step, loss, validation loss and gradient norm of each entry of a run, without its timings."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    numbers = [
        {key: entry[key] for key in ("step", "loss", "validation_loss", "gradient_norm") if key in entry}
        for entry in entries
    ]
    assert [entry["step"] for entry in numbers if "loss" in entry] == list(range(1, STEPS + 1))
    assert any("validation_loss" in entry for entry in numbers)
    return numbers


def assert_both_nodes_took_part(finished: Finished) -> None:
    assert finished.returncode == 0, finished.output[-8000:]
    assert set(re.findall(r"^(node-\w): ", finished.output, re.MULTILINE)) == {"node-a", "node-b"}


def test_two_nodes_with_a_hostfile(nodes: TwoNodes, checkout: Path, one_node: list[dict[str, float]]) -> None:
    command = ["deepspeed", "--num_nodes", "2", "--hostfile", str(nodes.hostfile), "launch/train.py"]
    command += ["--config", "configs/quickstart.yaml", "job.name=hostfile"]
    assert_both_nodes_took_part(nodes.run(command, cwd=checkout, timeout=SECONDS))
    assert curve(checkout / "runs" / "hostfile") == one_node


def test_two_nodes_to_the_letter(nodes: TwoNodes, checkout: Path, one_node: list[dict[str, float]]) -> None:
    nodes.serve_default_hostfile()
    command = ["deepspeed", "--num_nodes", "2", "launch/train.py"]
    assert_both_nodes_took_part(nodes.run(command, cwd=checkout, timeout=SECONDS))
    assert curve(checkout / "runs" / "quickstart") == one_node
