"""A node of a job's step: its launcher, a rank that dies on it, and how ranks that srun starts find each other."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from launch import slurm_node
from launch.health.node_watch import PULSES
from launch.slurm.world import first_host, meeting_port, tasks_per_node, world_of_step

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
