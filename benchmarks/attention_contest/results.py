"""The file of results: one entry for each row, kernel and run. Pure Python.

GPU clocks differ from run to run, so a ratio is taken between times of one run only: an entry holds all contestants
that took turns on a row, the one GPU among them, which was measured again before each of the others. Files merge by
run, and nothing is averaged over runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attention_contest.rows import IDEAL, ONE_GPU, Bar, Row

Entry = dict[str, Any]
"""{"row": Row's fields, "kernel": name, "gpus": P, "auto": name, "modes": {name: what was measured of it, or
{"failed": why}}}"""
Results = dict[str, Any]
"""{"runs": {run: what it ran on}, "rows": {key: {run: Entry}}}"""

BACKWARD_FLOPS = 2.5


def row_key(row: Row, kernel: str) -> str:
    return f"{row.name} / {kernel}"


def load(path: Path) -> Results:
    """What the file holds; nothing yet, if there is none."""
    return json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": {}}


def save(results: Results, path: Path) -> None:
    """Replaces the file at once: one that is interrupted leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def add(results: Results, run: str, about: dict[str, Any], entry: Entry) -> None:
    """Enters one row of a run."""
    results["runs"][run] = about
    results["rows"].setdefault(row_key(Row(**entry["row"]), entry["kernel"]), {})[run] = entry


def merged(files: Iterable[Results]) -> Results:
    """All runs of all files; a run that stands in several, an older copy of a file among them, counts once."""
    together: Results = {"runs": {}, "rows": {}}
    for results in files:
        together["runs"] |= results["runs"]
        for key, entries in results["rows"].items():
            together["rows"].setdefault(key, {}).update(entries)
    return together


def measured(results: Results, row: Row, kernel: str, names: Iterable[str]) -> bool:
    """Whether one run has measured all of these contestants on this row."""
    wanted = set(names)
    return any(wanted <= set(entry["modes"]) for entry in results["rows"].get(row_key(row, kernel), {}).values())


def share_of_ideal(entry: Entry, name: str, kind: str = "forward_backward") -> float:
    """The one GPU's time divided by the number of GPUs, over this mode's: of neighbouring rounds, where the run has
    measured them so."""
    mode = entry["modes"][name]
    if "shares" in mode:
        return mode["shares"][kind]
    return entry["modes"][ONE_GPU][kind] / entry["gpus"] / mode[kind]


def tflops(entry: Entry, name: str) -> float:
    """TFLOP/s of each GPU that takes part, forward and backward."""
    ranks = entry["gpus"]
    work = Row(**entry["row"]).flops(ranks) * (1 + BACKWARD_FLOPS)
    return work / (1 if name == ONE_GPU else ranks) / entry["modes"][name]["forward_backward"] / 1e9


def finished(entry: Entry) -> Iterator[str]:
    """Modes with times, one GPU first."""
    names = [name for name, mode in entry["modes"].items() if "failed" not in mode]
    yield from sorted(names, key=lambda name: name != ONE_GPU)


def fastest(entry: Entry, names: Iterable[str]) -> str | None:
    """By forward + backward; None if there is none."""
    return max(names, key=lambda name: share_of_ideal(entry, name), default=None)


def reached(entry: Entry, bar: Bar, ours: str | None = None) -> tuple[float, str, str] | None:
    """How many times as fast as the bar's rival our fastest mode (or the one that is named) was in this run, this mode
    and the rival; None if not measured."""
    names = list(finished(entry))
    candidates = (name for name in names if entry["modes"][name]["ours"] and name != ONE_GPU)
    ours = fastest(entry, (name for name in candidates if ours in (None, name)))
    if ours is None or ONE_GPU not in names:
        return None
    if bar.rival == IDEAL:
        return share_of_ideal(entry, ours), ours, IDEAL
    rival = fastest(entry, (name for name in names if name.startswith(bar.rival)))
    if rival is None:
        return None
    return share_of_ideal(entry, ours) / share_of_ideal(entry, rival), ours, rival


def runs_of(results: Results, row: Row, kernel: str) -> list[tuple[str, Entry]]:
    """Newest first."""
    return sorted(results["rows"].get(row_key(row, kernel), {}).items(), reverse=True)


def newest_shares(results: Results, row: Row, kernel: str) -> dict[str, tuple[float, bool]]:
    """For each mode, in the newest run that measured it: its share of the ideal, and whether it is ours."""
    found: dict[str, tuple[float, bool]] = {}
    for _, entry in runs_of(results, row, kernel):
        for name in finished(entry):
            if name != ONE_GPU and name not in found:
                found[name] = share_of_ideal(entry, name), entry["modes"][name]["ours"]
    return found
