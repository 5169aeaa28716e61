"""benchmarks/longest_context.py: what it tries and leaves out, what it keeps of it, and a real attempt on CPUs."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import longest_context
from benchmarks.attempt_limits import Limits
from benchmarks.longest_context import FEATURES, LENGTHS, job_for, search, table

ROOT, GIB = Path(__file__).parents[2], 2**30
H200 = Limits(139 * GIB, 256 * GIB, 0.5 * 989e12, 470)
OPTIONS = argparse.Namespace(layers=32, set=[])


def hopeless(feature: str, length: int, gpus: int = 2, limits: Limits = H200) -> str | None:
    return limits.hopeless(job_for(feature, length, gpus, OPTIONS), gpus, 1)


def test_the_longest_that_trains_is_found_with_few_attempts() -> None:
    tried = []

    def attempt(length: int) -> dict[str, Any]:
        tried.append(length)
        return {"failed": "out of memory"} if length > 100_000 else {}

    assert search(LENGTHS, lambda length: "too long" if length > 300_000 else None, attempt) == 65_536
    assert tried == [262_144, 131_072, 65_536]
    assert search([8192], lambda length: "too long", attempt) is None


def test_what_is_left_out() -> None:
    """Half a million tokens fit two H200s with activations on the host alone; a million take too long."""
    kept, parked, attended, optimizer, everything = list(FEATURES)[1:]
    assert hopeless(parked, 524_288) is None
    assert "estimate" in str(hopeless(kept, 524_288)) and "on its device" in str(hopeless(kept, 524_288))
    assert "256 GiB of host memory, of 250 GiB" in str(
        hopeless(attended, 524_288, limits=Limits(139 * GIB, 250 * GIB, H200.flops, 470))
    )
    assert "s a step, of 470" in str(hopeless(parked, 1_048_576, limits=Limits(10**13, 10**13, H200.flops, 470)))
    assert "of host memory" in str(hopeless(everything, 524_288))
    assert hopeless(optimizer, 131_072, gpus=1) is None and hopeless(kept, 8192, gpus=1) is not None


def test_every_set_of_features_is_a_job() -> None:
    for feature in FEATURES:
        for gpus in (1, 2, 4):
            job = job_for(feature, 65_536, gpus, OPTIONS)
            assert job.tokens_per_step == 65_536 and job.accumulation_steps(gpus) == 1


def test_an_attempt_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, of two processes: it leaves a row, and a second search only reads it."""
    output, feature = tmp_path / "found.json", "and activations in host memory"
    small = [
        "model.hidden_size=64",
        "model.intermediate_size=160",
        "model.vocab_size=512",
        "model.num_attention_heads=4",
    ]
    small += ["model.num_key_value_heads=2", "training.mlp_tile_tokens=128", "model.attention_backend=cpu"]
    command = [sys.executable, "benchmarks/longest_context.py", "--output", str(output), "--features", f"^{feature}$"]
    command += ["--gpus", "2", "--layers", "2", "--length", "512", "--set", *small]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and "step 1:" in done.stdout, done.stdout
    (row,) = json.loads(output.read_text()).values()
    assert row["tokens"] == 512 and len(row["losses"]) == 1 and 6 < row["losses"][0] < 7 and row["seconds"] > 0
    monkeypatch.setattr(longest_context, "torchrun", lambda *_: pytest.fail("tried again"))
    monkeypatch.setattr(sys, "argv", ["longest_context.py", *command[2:]])
    longest_context.main()
    assert f"| 2 | {feature} | 2 | 512 |" in table(json.loads(output.read_text()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--length", "524288"], r"no GPUs here; 524,288 tokens, full recomputation: .*, of .*; run this where"),
        (["--length", "8192"], r"8,192 tokens, full recomputation: "),
        ([], "no GPUs here; run this where there are some, or try the script with a short --length"),
    ],
)
def test_without_gpus_no_real_attempt_is_started(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(longest_context, "torchrun", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["longest_context.py", "--output", str(tmp_path / "found.json"), *arguments])
    with pytest.raises(SystemExit):
        longest_context.main()
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))
    assert not list(tmp_path.iterdir())


def test_the_table_says_what_twice_the_length_did() -> None:
    about: dict[str, Any] = {"gpus": 2, "features": "some", "layers": 32}
    row = about | {"seconds": 300.0, "tokens_per_second_per_device": 870.0, "peak_gib": 110.0, "estimated_gib": 105.0}
    results = {
        "a": about | {"tokens": 1_048_576, "failed": "not tried: about 1,240 s a step, of 470"},
        "b": row | {"tokens": 524_288, "estimated_host_gib": 128.0},
        "c": about | {"gpus": 1, "tokens": 8192, "failed": "OutOfMemoryError"},
    }
    held, _, missing = table(results).partition("\n\n")
    lines = held.splitlines()
    assert missing.startswith(f'Not measured yet: "{next(iter(FEATURES))}", ')
    assert lines[2].startswith("| 2 | some | 32 | 524,288 | 300.0 | 870 |")
    assert lines[2].endswith("| 110.0 | 105.0 | 128 | not tried: about 1,240 s a step, of 470 |")
    assert lines[3].startswith("| 1 | some | 32 | none |") and all(line.count("|") == 12 for line in lines)
