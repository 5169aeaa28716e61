"""Standard streams as bad machines leave them: closed, or into a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import os, sys
from launch.environment import end_process, place_in_world
place_in_world()
print("said")
with open(os.devnull) as file:
    print(file.fileno() > 2, sys.stdin.read() == "", file=sys.stderr)
end_process(3)
"""


def test_closed_and_full_streams_end_no_run() -> None:
    """The first file that is opened afterwards is in no stream's place, where prints would land in it."""
    for streams, said in (("<&- >&-", "True True\n"), ("</dev/null >/dev/full", "True True\n")):
        command = ["bash", "-c", f'PYTHONUNBUFFERED= exec "$0" -c "$1" {streams}', sys.executable, CODE]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (3, said)
