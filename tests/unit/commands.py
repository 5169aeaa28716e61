"""Commands of the project, each in a process of its own that need not import torch anew."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

from tests.distributed.harness import PRELOADED


def _main(script: str, arguments: list[str], folder: Path) -> None:
    """In a process of its own: `python launch/SCRIPT.py` in the folder, its words in the folder's log."""
    os.chdir(folder)
    with open("log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    status = importlib.import_module(f"launch.{script}").main(arguments)
    sys.stdout.flush()
    os._exit(status)


def run_in(folder: Path, script: str, arguments: list[str], status: int = 0) -> str:
    """What the commands in this folder have said so far; this one must end with that exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(script, arguments, folder))
    process.start()
    process.join(240)
    said = (folder / "log").read_text(errors="replace")
    assert process.exitcode == status, said
    return said
