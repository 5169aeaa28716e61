"""What launch/run_eval.py refuses before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import run_eval


@pytest.mark.parametrize("named", ["missing/result.json", "."])
def test_a_result_that_could_not_be_written_is_said_at_once(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_eval.main([f"--run={tmp_path}", f"--output={tmp_path / named}"])
    said = capsys.readouterr().err
    assert "must be a file in a folder that exists; make " in said and str((tmp_path / named).parent) in said


def test_a_folder_of_others_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(SystemExit, match="2"):
        run_eval.main([f"--run={tmp_path}"])
    assert f"the result cannot be written to {tmp_path}; name a file elsewhere with --output" in capsys.readouterr().err
