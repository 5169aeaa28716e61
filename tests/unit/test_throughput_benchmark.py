"""The benchmark's comparison: the same work for every system, rates compared within one run only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import train_throughput
from row_process import load, save
from throughput_report import comparison, over_anchor, panels, table
from train_throughput import ANCHOR, ROWS

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.intermediate_size=192",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "training.sequence_length=256",
    "training.global_batch_size=4",
    "training.compile=false",
    "optimizer.learning_rate=3e-4",
]


@pytest.mark.parametrize("alone", [0, 2])
def test_peers_do_the_same_work(alone: int, tmp_path: Path) -> None:
    """From the same weights on the same tokens transformers' Llama has our losses and gradient norms: nothing is left
    out, and nothing is scaled otherwise. So it is where a rank of two hears only itself: that stands in for its peer in
    the same way, whoever trains."""
    rows = {"ours": "8k, ZeRO-3, selective", "theirs": "Hugging Face 8k, full"}
    processes = {}
    for name, row in rows.items():
        command = [sys.executable, "benchmarks/train_throughput.py", "--row", row, "--layers", "2", "--steps", "3"]
        command += ["--alone", str(alone)]
        command += ["--output", str(tmp_path / f"{name}.json"), "--set", *TINY]
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        environment = os.environ | world | {"MASTER_PORT": "0", "PYTHONPATH": str(ROOT)}
        processes[name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    found = {}
    for name, process in processes.items():
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
        (found[name],) = json.loads((tmp_path / f"{name}.json").read_text()).values()
    ours, theirs = found["ours"], found["theirs"]
    assert ours["losses"][0] - ours["losses"][-1] > 0.02, "no learning to compare"
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=2e-4)
    assert theirs["gradient_norms"] == pytest.approx(ours["gradient_norms"], rel=5e-3)
    assert theirs["tokens_per_step"] == ours["tokens_per_step"] == 1024


def row(name: str, run: str, rate: float, system: str = "ringzero", tp: int = 1) -> dict[str, object]:
    figures = {"tokens_per_second_per_device": rate, "peak_gib": 2.0, "losses": [1.0], "measured": "2026-11-22"}
    kind = {"sequence_length": 8192, "zero_stage": 3, "tensor_parallel_size": tp}
    return {"row": name, "run": run, "layers": 32, "system": system, "settings": [], **kind, **figures}


def test_an_interrupted_run_goes_on_and_every_machine_begins_with_the_anchor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, started = tmp_path / "found.json", list[str]()

    def drive(machine: str, rows: str, fails_at: int = 0) -> list[str]:
        """The rows that a start on `machine` measures; it is interrupted in the one of that number."""

        def measured(_script: str, arguments: list[str], *_: object) -> None:
            started.append(arguments[arguments.index("--row") + 1])
            if len(started) == fails_at:
                raise KeyboardInterrupt
            found = load(output) | {f"{machine} / {started[-1]} / 32": row(started[-1], machine, 100.0)}
            save(found, output)

        started.clear()
        monkeypatch.setattr(train_throughput, "torchrun", measured)
        monkeypatch.setattr(train_throughput, "_run_id", lambda _options: machine)
        monkeypatch.setattr(sys, "argv", ["train_throughput.py", "--output", str(output), "--rows", rows])
        with suppress(KeyboardInterrupt):
            train_throughput.main()
        return list(started)

    wanted = [name for name in ROWS if "64k" in name]
    assert len(wanted) > 3 and ANCHOR not in wanted
    assert drive("a", "64k", fails_at=3) == [ANCHOR, *wanted[:2]]
    assert drive("a", "64k") == wanted[1:], "neither the anchor nor the first row again"
    assert drive("a", "64k") == []
    assert drive("b", "64k|TP 2") == [ANCHOR, *(name for name in ROWS if "TP 2" in name)]


def test_rows_are_compared_within_their_run() -> None:
    results = {
        "1": row("anchor", "a", 100.0),
        "2": row("other", "a", 120.0),
        "3": row("anchor", "b", 200.0),
        "4": row("other", "b", 210.0),
        "5": row("anchor", "b", 800.0) | {"layers": 8},
        "6": row("other", "b", 720.0) | {"layers": 8},
    }
    assert [over_anchor(results, found) for found in results.values()] == [1, 1.2, 1, 1.05, 1, 0.9]
    assert table(results).count("Run ") == 2


def test_a_failed_anchor_compares_nothing() -> None:
    results = {
        "1": {"row": "anchor", "run": "a", "layers": 32, "failed": "out of memory", "measured": "2026-11-22"},
        "2": row("other", "a", 120.0),
    }
    assert over_anchor(results, results["2"]) is None
    assert "out of memory" in table(results)
    assert len(comparison(results).splitlines()) == 2


def test_our_best_is_compared_with_their_best_through_the_anchors() -> None:
    results = {
        "1": row("anchor", "a", 100.0),
        "2": row("ours", "a", 110.0),
        "3": row("ours, tp", "a", 99.0, tp=2),
        "4": row("anchor", "b", 200.0),  # a machine twice as fast
        "5": row("theirs", "b", 176.0, "torchtitan"),
        "6": row("theirs, slower", "b", 100.0, "torchtitan"),
        "7": row("another anchor", "c", 100.0),
        "8": row("theirs", "c", 50.0, "torchtitan"),
        "9": row("anchor", "d", 100.0) | {"settings": ["training.memory_budget_gib=134"]},
        "10": row("theirs", "d", 80.0, "torchtitan"),
    }
    assert comparison(results).splitlines()[2:] == [
        "| 32 | another anchor | theirs | 2.000 | c |",
        "| 32 | anchor | theirs | 1.250 | d |",
        "| 32 | ours | theirs | 1.250 | a, b |",
        "| 32 | ours, tp | theirs | 1.125 | a, b |",
        "| 32 | ours, tp | ours | 0.900 | a, b |",
    ]
    assert panels(results) == {
        "8,192 tokens, 32 layers, run c": [("another anchor", 1.0, "ringzero"), ("theirs", 0.5, "torchtitan")],
        "8,192 tokens, 32 layers, run d": [("anchor", 1.0, "ringzero"), ("theirs", 0.8, "torchtitan")],
        "8,192 tokens, 32 layers, runs a, b": [
            ("anchor", 1.0, "ringzero"),
            ("ours", 1.1, "ringzero"),
            ("ours, tp", 0.99, "ringzero"),
            ("theirs", 0.88, "torchtitan"),
            ("theirs, slower", 0.5, "torchtitan"),
        ],
    }
