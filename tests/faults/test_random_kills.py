"""kill -9 at random moments, each time resumed on another layout: what is trained on stays what it would have been."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.launched import Launched, TinyJob

pytestmark = pytest.mark.faults

KILLS, STEPS, SEED = 20, 100, 20261122

LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (2, {"context_parallel_size": 2, "zero_stage": 3}),
    (1, {"zero_stage": 0}),
    (2, {"tensor_parallel_size": 2, "zero_stage": 1}),
    (2, {"zero_stage": 2}),
    (2, {"tensor_parallel_size": 2, "zero_stage": 3}),
]
"""Processes and the parallel section; the rest of the world is data parallel."""

IN_A_SAVE = [
    {"event": "os.mkdir", "path": ".partial"},
    {"event": "open", "path": ".partial/__"},
    {"event": "open", "path": ".partial/.metadata"},
    {"event": "open", "path": ".partial/manifest.json"},
    {"event": "os.rename", "path": ".partial"},
    {"event": "shutil.rmtree", "path": ".partial"},
]
"""Moments of a save at which rank 0, or, where it writes too, another rank, is struck."""


def tiny_job(folder: Path) -> TinyJob:
    return TinyJob(
        folder,
        max_steps=STEPS,
        optimizer={"learning_rate": 1e-3},
        checkpoint={"save_interval": 2, "keep_last": 3, "keep_every": 20},
    )


def start(tiny: TinyJob, layout: tuple[int, dict[str, int]], asynchronous: bool, fault: Any = None) -> Launched:
    processes, parallel = layout
    sizes = {"tensor_parallel_size": 1, "context_parallel_size": 1} | parallel
    overrides = [f"parallel.{key}={value}" for key, value in sizes.items()]
    overrides.append(f"checkpoint.asynchronous={str(asynchronous).lower()}")
    return tiny.launch(processes, *overrides, fault=fault)


def batches(tiny: TinyJob) -> dict[int, str]:
    """Step -> hash of its tokens, from every manifest that there is; they must not contradict each other."""
    found: dict[int, str] = {}
    for path in tiny.checkpoints.glob("step-????????/manifest.json"):
        for step, digest in json.loads(path.read_text())["next_batches"].items():
            assert found.setdefault(int(step), digest) == digest, (path, step)
    return found


def test_twenty_kills_change_neither_tokens_nor_losses(tmp_path: Path) -> None:
    whole = tiny_job(tmp_path / "whole")
    with start(whole, LAYOUTS[1], True) as job:
        assert job.wait() == 0, job.output[-8000:]
    tiny, chance, seen = tiny_job(tmp_path / "killed"), random.Random(SEED), dict[int, str]()
    for number in range(KILLS):
        layout, asynchronous = LAYOUTS[number % len(LAYOUTS)], chance.random() < 0.5
        before = max(tiny.complete(), default=0)
        in_a_save = chance.random() < 0.5
        fault: dict[str, Any] | None = None
        if in_a_save:
            moment = chance.choice(IN_A_SAVE)
            rank = chance.randrange(layout[0]) if moment["path"].endswith("__") else 0
            rank = 0 if layout[1]["zero_stage"] == 0 else rank
            fault = moment | {"rank": rank, "nth": chance.randint(1, 3), "action": "kill"}
        with start(tiny, layout, asynchronous, fault) as job:
            if fault:
                job.until_said(f"fault: rank {fault['rank']}")
            else:
                job.until_said(f"resumed from step {before}, " if before else "run directory")
                goal = before + chance.randint(1, 4)
                job.until(lambda goal=goal: tiny.logged() >= goal)
                ranks = list(job.ranks().values())
                for pid in ranks if chance.random() < 0.5 else [chance.choice(ranks)]:  # a node's loss, or a rank's
                    job.kill(pid)
            job.seconds_to_die()
            assert job.wait() != 0
            assert not before or f"resumed from step {before}, " in job.output, job.output[-4000:]
        print(f"kill {number + 1}: {layout}, {'asynchronous' if asynchronous else 'synchronous'}, {fault}: ", end="")
        print(f"from step {before} to {tiny.logged()}, complete {tiny.complete()}")
        assert max(tiny.complete(), default=0) >= before, "nothing that was saved is lost"
        for step, digest in batches(tiny).items():
            assert seen.setdefault(step, digest) == digest
    assert 20 <= max(tiny.complete()) < STEPS, "the kills were spread over a run that was under way"
    with start(tiny, LAYOUTS[0], True) as job:
        assert job.wait() == 0, job.output[-8000:]
    stream = batches(whole)
    seen |= batches(tiny)
    assert all(stream[step] == digest for step, digest in seen.items() if step in stream)
    assert len(seen.keys() & stream.keys()) >= STEPS - 20
    assert sorted(tiny.curve()) == list(range(1, STEPS + 1))
    for step, (loss, norm) in tiny.curve().items():
        expected_loss, expected_norm = whole.curve()[step]
        assert math.isclose(loss, expected_loss, rel_tol=1e-5), (step, loss, expected_loss)
        assert math.isclose(norm, expected_norm, rel_tol=1e-3), (step, norm, expected_norm)
    assert tiny.complete() == [20, 40, 60, 80, 96, 98, 100]
