"""One measurement in fresh processes, with a time limit: what went wrong with it is a result, not an end. And the file
that results are kept in."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
"""What a file of results holds: of each measurement, by its name, what was found or why it failed."""


def results_parser(
    description: str | None, measured: str, timeout: float, document: str | None = None
) -> argparse.ArgumentParser:
    """The options of what fills a file of results, one measurement after the other.

    `measured` is what it calls a measurement: the option of that name is for the processes that make one. `timeout`: by
    default, in seconds. `document`: what --document takes, where there is that option, and --table.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help=f"changes the job of every {measured}"
    )
    parser.add_argument("--timeout", type=float, default=timeout, help=f"seconds that one {measured} may take")
    parser.add_argument("--again", action="store_true", help=f"make each {measured} anew that the output file holds")
    if document:
        parser.add_argument("--document", type=Path, metavar=document)
        parser.add_argument("--table", action="store_true")
    parser.add_argument(f"--{measured}", help=argparse.SUPPRESS)
    return parser


def load(path: Path) -> Results:
    """Nothing yet, if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(results: Results, path: Path) -> None:
    """Replaces the file."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def torchrun(
    script: str,
    arguments: Sequence[str],
    processes: int,
    log: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
) -> str | None:
    """Runs `script` in `processes` processes of this node, all output to `log`, and prints its "step ..." lines.

    `environment` adds to this process's. Returns None, or in one line why it failed; `timeout` is in seconds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with log.open("w") as written:
        process = subprocess.Popen(
            [*command, script, *arguments],
            stdout=written,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )
        try:
            status: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = f"took longer than {timeout:.0f} s"
            process.terminate()  # torchrun ends its processes, which are sessions of their own: no signal reaches all
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(line for line in lines if line.startswith("step ")), flush=True)
    return _reason(status, lines) if status else None


def _reason(status: int | str, lines: list[str]) -> str:
    """One line on why it failed: running out of memory before what follows from it."""
    if isinstance(status, str):
        return status
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    memory = [line for line in errors if "OutOfMemory" in line]
    return [*memory, *errors, f"exit status {status}"][0][:200]
