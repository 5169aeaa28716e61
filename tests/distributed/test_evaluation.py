"""Validation loss by position, on several layouts and by the command, against the plain model's log-probabilities."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.build import build_engine
from launch.data.corpora import load_corpora, validation_batches
from launch.inference.evaluation import evaluated, position_edges, table
from launch.stepper import Stepper
from launch.weights.initial_weights import load_initial_weights
from parallel.mesh import ParallelMesh
from tests.distributed.evaluation_twin import LENGTH, expected, job_of, to_evaluate
from tests.distributed.harness import run_distributed

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [(1, 1, 0, False), (2, 2, 3, True), (1, 2, 2, False)]
"""tp, cp, stage, document mask; dp is what remains of four."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_evaluate(tmp_path_factory.mktemp("evaluation"))


def evaluate(folder: Path) -> list[dict[str, Any]]:
    found = []
    for layout in LAYOUTS:
        job = job_of(folder, *layout)
        found.append(evaluated(job, None, ParallelMesh.create(job.mesh_shape(4)), torch.device("cpu")))
    return found


def evaluate_while_training(folder: Path) -> list[float]:
    """Twice on each layout: what the first left behind changes nothing."""
    losses = []
    for layout in LAYOUTS:
        job = job_of(folder, *layout)
        mesh = ParallelMesh.create(job.mesh_shape(4))
        engine, _ = build_engine(job, mesh, torch.device("cpu"))
        load_initial_weights(job, engine)
        stepper = Stepper(job, mesh, engine)
        batches = validation_batches(load_corpora(job), job, mesh.dp_size, mesh.dp_rank)
        modes = []
        hook = engine.model.register_forward_pre_hook(lambda model, _, modes=modes: modes.append(model.training))
        losses += [stepper.evaluate(batches.once(job.training.evaluation_batches)) for _ in range(2)]
        hook.remove()
        assert not any(modes) and engine.model.training, "no block recomputes, and a step may follow"
    return losses


def check(result: dict[str, Any], tokens: list[tuple[int, float]]) -> None:
    assert result["tokens"] == len(tokens)
    assert result["loss"] == pytest.approx(np.mean([loss for _, loss in tokens]), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    edges = [0, 1, 2, 4, 8, 16, 32]
    assert [(row["first"], row["last"]) for row in result["positions"]] == [
        (first, end - 1) for first, end in zip(edges, edges[1:], strict=False)
    ]
    for row in result["positions"]:
        inside = [loss for position, loss in tokens if row["first"] <= position <= row["last"]]
        assert row["tokens"] == len(inside)
        assert row["loss"] == (pytest.approx(np.mean(inside), rel=1e-5) if inside else None)
    assert len({row["loss"] for row in result["positions"]}) > 3, "ranges differ"


def test_every_layout_gives_the_loss_of_each_range(folder: Path) -> None:
    tokens = {mask: expected(folder, mask) for mask in (False, True)}
    assert len(tokens[False]) > 6 * LENGTH
    assert max(position for position, _ in tokens[False]) == LENGTH - 1
    for found in run_distributed(evaluate, 4, folder):
        for layout, result in zip(LAYOUTS, found, strict=True):
            check(result, tokens[layout[3]])


def test_a_run_logs_the_validation_loss_of_the_plain_model(folder: Path) -> None:
    means = {mask: np.mean([loss for _, loss in expected(folder, mask)]) for mask in (False, True)}
    wanted = [means[document_mask] for *_, document_mask in LAYOUTS for _ in range(2)]
    for losses in run_distributed(evaluate_while_training, 4, folder):
        assert losses == pytest.approx(wanted, rel=1e-5)


def test_the_command_writes_table_and_json(folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = folder / "result.json"
    command = [sys.executable, str(ROOT / "launch" / "run_eval.py"), "--run", str(folder)]
    command += ["--config", str(folder / "job.yaml"), "--output", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(output.read_text())
    check(result, expected(folder, False))
    assert f"{result['loss']:.4f} nats a token" in ended.stdout and "16-31" in ended.stdout
    assert str(output) in ended.stdout


def test_a_model_of_another_shape_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.run_eval import main

    asked = ["--run", str(folder), "--config", str(folder / "job.yaml"), "model.num_hidden_layers=3"]
    with pytest.MonkeyPatch.context() as patch:
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in world.items():
            patch.setenv(name, value)
        assert main(asked) == 2
    assert "of another model: num_hidden_layers (3 here, 2 there)" in capsys.readouterr().err


def test_ranges_double() -> None:
    assert position_edges(256) == [0, 4, 8, 16, 32, 64, 128, 256]
    assert position_edges(131_072)[:3] == [0, 2048, 4096]
    assert position_edges(100, 30) == [0, 30, 60, 100]
    assert position_edges(1) == [0, 1] and position_edges(8, 50) == [0, 8]


def test_a_range_without_tokens_has_no_loss() -> None:
    rows = [{"first": 0, "last": 0, "loss": 2.0, "tokens": 3}, {"first": 1, "last": 1, "loss": None, "tokens": 0}]
    rows.append({"first": 2, "last": 3, "loss": 1.5, "tokens": 3})
    said = table({"weights": "w", "loss": 1.75, "perplexity": 5.755, "tokens": 6, "positions": rows})
    assert "-0.5000" in said and said.count("\n") == 4
