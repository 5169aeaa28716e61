"""The verdict on loss curves: what counts as noise, and that only runs on the same tokens are compared."""

from __future__ import annotations

from typing import Any

import pytest

from loss_curves import BASELINE, table


def curve(*losses: float, corpus: str = "same") -> dict[str, Any]:
    return {"losses": losses, "all_seconds": [0.5], "gpus": 1, "kernel": "k", "corpus": corpus, "bigram_entropy": 2.0}


def test_differences_are_held_against_the_larger_noise() -> None:
    results = {
        BASELINE: curve(3.0, 2.0),
        "one GPU, another kernel": curve(3.0, 2.0 + 0.002),
        "one GPU, micro-batch 1": curve(3.0, 2.0 - 0.001),
        "two ranks, cp 2": curve(3.003, 2.0 - 0.003),
    }
    lines = table(results).splitlines()
    # RMS 0.002 / sqrt(2) is the larger noise; cp's is 0.003.
    assert lines[2].startswith(f"| {BASELINE} | 1 | k | 3.00000 | 2.5000 | 0.00e+00")
    assert lines[-3].endswith("| 3.00e-03 | 3.00e-03 | shared | 2.12 x the noise |")


def test_other_tokens_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="different corpora"):
        table({BASELINE: curve(3.0), "two ranks, cp 2": curve(3.0, corpus="another")})
