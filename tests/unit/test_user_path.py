"""Paths on command lines: a shell leaves the ~ of --run=~/there alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import audit_data, convert, generate, run_eval, status, submit, train


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (audit_data, ["~/nowhere"]),
        (convert, ["to-hf", "~/nowhere", "~/out"]),
        (generate, ["--run=~/nowhere", "--prompt=a", "--device=cpu"]),
        (run_eval, ["--run=~/nowhere"]),
        (status, ["~/nowhere"]),
        (submit, ["~/nowhere"]),
        (train, ["--check", "--config=~/nowhere"]),
    ],
)
def test_every_tool_looks_in_the_home_directory(
    command: object,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.main(arguments)  # type: ignore[attr-defined]
    assert f"{tmp_path}/nowhere" in capsys.readouterr().err
