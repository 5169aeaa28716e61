"""Files and folders that appear as a whole, after failures and over what a killed process left."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from launch.atomic_files import completed_folder, write_atomically


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "exports" / "model"
    with pytest.raises(KeyboardInterrupt), completed_folder(path) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    killed = path.with_name("model.partial")
    killed.mkdir()
    (killed / "half").touch()
    with completed_folder(path) as partial:
        (partial / "whole").touch()
        assert not path.exists()
    assert sorted(path.parent.rglob("*")) == [path, path / "whole"]


def test_a_failure_that_takes_the_folder_too_is_told_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first"), completed_folder(tmp_path / "model") as partial:
        partial.rmdir()
        raise ValueError("first")


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    with patch.object(Path, "write_text", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
