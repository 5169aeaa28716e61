"""Where the watchdogs of a run meet, and what they and the probes leave. Imports no torch: the job script reads it too.

RUN/health/123-0/         of one start: job and restart under Slurm, else the time
    alarm                 empty, until somebody has waited too long
    rank-3.json           what rank 3 says of itself    rank-3.stacks   Python stacks of its threads
    node-1.json           states of the ranks of node 1, from outside them (under Slurm)
    verdict-0.txt         who is missing, as rank 0 sees it
    verdict-node-1.txt    what node 1 has seen of its ranks, when none of them spoke and none came back
    suspects.json         nodes to keep away from
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.atomic_files import write_atomically


class HealthFolder:
    """A start's. Nothing is listed while it runs, and what is polled exists from the start: a network file system looks
    such files up again whenever they are opened, while a name that was missing a moment ago may stay missing for it."""

    def __init__(self, run: Path, start: str) -> None:
        self.path = run / "health" / start

    def make(self) -> None:
        """Each rank does, before it looks."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "alarm").touch()

    def alarm(self) -> str:
        """Who has raised it and why; empty while all is well."""
        return self._read("alarm") or ""

    def raise_alarm(self, text: str) -> None:
        (self.path / "alarm").write_text(text)

    def write(self, name: str, text: str) -> None:
        """Replaces a file at once."""
        write_atomically(self.path / name, text)

    def write_node(self, number: int, states: Mapping[int, str]) -> None:
        """What a node's ranks are doing, seen from outside."""
        self.write(f"node-{number}.json", json.dumps(states))

    def node(self, number: int) -> dict[int, str]:
        return {int(rank): state for rank, state in json.loads(self._read(f"node-{number}.json") or "{}").items()}

    def report(self, rank: int) -> str | None:
        return self._read(f"rank-{rank}.json")

    def stacks(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.stacks"

    def verdict(self, rank: int) -> str | None:
        """What `rank` has found, if it was the one to speak."""
        return self._read(f"verdict-{rank}.txt")

    def told(self) -> list[Path]:
        """All verdicts."""
        return sorted(self.path.glob("verdict-*.txt"))

    def write_suspects(self, nodes: Sequence[str]) -> None:
        """Nodes with ranks that were missing, or rates far below the others'."""
        self.write("suspects.json", json.dumps(list(nodes)))

    def suspects(self) -> list[str]:
        nodes: list[str] = json.loads(self._read("suspects.json") or "[]")
        return nodes

    def _read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text()
        except FileNotFoundError:
            return None
