"""kill -9 at random moments, each resume the next victim: what is trained on stays what it would have been."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from launch.audit_data import faults_of_steps
from launch.data.run_record import RunRecord
from tests.faults.forked import Forked
from tests.faults.launched import TinyJob

pytestmark = pytest.mark.faults

STEPS, SAVE_INTERVAL = 48, 2

SAME: tuple[int, dict[str, int]] = (2, {"context_parallel_size": 2, "zero_stage": 3})
"""Processes and the parallel section; the rest of the world is data parallel."""
OTHERS: list[tuple[int, dict[str, int]]] = [
    (1, {"zero_stage": 0}),
    (4, {"tensor_parallel_size": 2, "context_parallel_size": 2, "zero_stage": 3}),
    (2, {"tensor_parallel_size": 2, "zero_stage": 1}),
    (2, {"zero_stage": 2}),
    (2, {"tensor_parallel_size": 2, "zero_stage": 3}),
]
CHAIN = [SAME] * 4 + OTHERS + OTHERS
"""Of one run: the layout of each victim; the last resume is on SAME again. Of fourteen kills three are resumed on the
same layout and eleven on another: two runs make 6 and 22."""

IN_A_SAVE = [
    {"event": "os.mkdir", "path": "checkpoints/step-0"},
    {"event": "open", "path": ".partial/__"},
    {"event": "open", "path": ".partial/.metadata"},
    {"event": "open", "path": ".partial/manifest.json"},
    {"event": "os.rename", "path": "checkpoints/step-"},
    {"event": "shutil.rmtree", "path": "checkpoints/step-0"},
]
"""Moments of a save at which rank 0, or, where it writes too, another rank, is struck."""


def tiny_job(folder: Path, **checkpoint: int) -> TinyJob:
    saving = {"save_interval": SAVE_INTERVAL, "keep_last": 2, "keep_every": 20} | checkpoint
    return TinyJob(folder, max_steps=STEPS, optimizer={"learning_rate": 1e-3}, checkpoint=saving)


def start(tiny: TinyJob, layout: tuple[int, dict[str, int]], asynchronous: bool, fault: Any = None) -> Forked:
    processes, parallel = layout
    sizes = {"tensor_parallel_size": 1, "context_parallel_size": 1} | parallel
    overrides = [f"parallel.{key}={value}" for key, value in sizes.items()]
    overrides.append(f"checkpoint.asynchronous={str(asynchronous).lower()}")
    return Forked(tiny, processes, *overrides, fault=fault)


def promised(tiny: TinyJob) -> dict[int, str]:
    """Step -> hash of its tokens, from every manifest that there is; they must not contradict each other."""
    found: dict[int, str] = {}
    for path in tiny.checkpoints.glob("step-????????/manifest.json"):
        for step, digest in json.loads(path.read_text())["next_batches"].items():
            assert found.setdefault(int(step), digest) == digest, (path, step)
    return found


def strike(job: Forked, tiny: TinyJob, before: int, fault: dict[str, Any] | None, chance: random.Random) -> None:
    """Ends the job at the fault's moment, or at a random one a few steps on."""
    everybody = range(len(job))
    if fault:
        job.until_said(f"fault: rank {fault['rank']}")
        lost = [fault["rank"]]
    else:
        job.until_said(f"resumed from step {before}, " if before else "run directory")
        goal = before + chance.randint(2, 5)
        job.until(lambda: tiny.logged() >= goal)
        lost = list(everybody) if chance.random() < 0.5 else [chance.choice(everybody)]  # a node's loss, or a rank's
    job.lose(lost, noticed_after=chance.random())
    assert all(job.died(rank) for rank in lost), job.output[-4000:]


def draw_fault(layout: tuple[int, dict[str, int]], chance: random.Random) -> dict[str, Any] | None:
    """Half of the kills come while a checkpoint is saved."""
    processes, parallel = layout
    if chance.random() < 0.5:
        return None
    moment = chance.choice(IN_A_SAVE)
    all_write = moment["path"].endswith("__") and parallel["zero_stage"] > 0
    rank = chance.randrange(processes) if all_write else 0
    return moment | {"rank": rank, "nth": chance.randint(1, 2), "action": "kill"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The undisturbed run, which keeps every checkpoint."""
    tiny = tiny_job(tmp_path_factory.mktemp("whole"), keep_last=STEPS)
    with start(tiny, SAME, False) as job:
        assert job.wait() == 0, job.output[-8000:]
    return tiny


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_kills_change_neither_tokens_nor_losses(asynchronous: bool, tmp_path: Path, whole: TinyJob) -> None:
    tiny, chance, tokens = tiny_job(tmp_path), random.Random(f"kill -9, {asynchronous}"), promised(whole)
    moved_at, moves = 0, sum(one != other for one, other in zip(CHAIN, [*CHAIN[1:], SAME], strict=True))
    assert moves >= 10
    for number, layout in enumerate(CHAIN):
        before, fault = max(tiny.complete(), default=0), draw_fault(layout, chance)
        with start(tiny, layout, asynchronous, fault) as job:
            strike(job, tiny, before, fault, chance)
            assert not before or f"resumed from step {before}, " in job.output, job.output[-4000:]
        print(f"kill {number + 1}: {layout}, {fault}: from {before} to {tiny.logged()}, complete {tiny.complete()}")
        assert max(tiny.complete(), default=0) >= before, "nothing that was saved is lost"
        assert promised(tiny).items() <= tokens.items()
        moved_at = before if layout == SAME else moved_at
    assert moved_at >= 4, "the kills on the same layout were spread over a run that was under way"
    assert moved_at + 4 <= max(tiny.complete()) < STEPS
    with start(tiny, SAME, asynchronous) as job:
        assert job.wait() == 0, job.output[-8000:]
    assert tiny.complete() == [20, 40, STEPS - SAVE_INTERVAL, STEPS]
    assert_same_tokens(tiny, whole)
    assert sorted(tiny.curve()) == list(range(1, STEPS + 1))
    for step, (loss, norm) in tiny.curve().items():
        expected_loss, expected_norm = whole.curve()[step]
        if step <= moved_at:
            assert (loss, norm) == (expected_loss, expected_norm), f"step {step}: not bit for bit"
        assert math.isclose(loss, expected_loss, rel_tol=1e-5), (step, loss, expected_loss)
        assert math.isclose(norm, expected_norm, rel_tol=1e-3), (step, norm, expected_norm)


def assert_same_tokens(tiny: TinyJob, whole: TinyJob) -> None:
    """What the ranks noted that they read, step by step, is what the undisturbed run read and the corpus holds."""
    mine, expected = RunRecord.read(tiny.run), RunRecord.read(whole.run)
    assert mine.steps == expected.steps == range(STEPS)
    assert [mine.noted[step] for step in mine.steps] == [expected.noted[step] for step in expected.steps]
    assert not list(faults_of_steps(mine, quick=False))
