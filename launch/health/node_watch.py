"""Lets a node watch its ranks from outside: ranks write down what they do and for how long they may, and it reads that.

The records are in the node's memory, because the cause of a hang may be the file system. Imports no torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from launch.health.processes import process_state
from launch.standard_output import say

PULSES = "RINGZERO_PULSES"
"""Variable that tells a rank where its node wants to see its pulse."""
_SLOT = 256
"""Bytes of one rank's."""
_TICK = 1.0
_LATE = 30.0
"""Seconds beyond its time until a node speaks for its ranks, whose own verdict comes within 20."""


@dataclass(frozen=True)
class Pulse:
    """One look of a rank's watchdog."""

    rank: int
    pid: int
    looks: int
    """Looks so far. If the number does not change, the rank is not running."""
    activity: str
    left: float
    """Seconds until that takes too long; negative from then on."""
    grace: float | None
    """Seconds from the verdict to the end; None where a hang is only told."""


class Pulses:
    """Those of a node, in a piece of memory that is gone when the last process that has it open is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """The path by which other processes of the node find it, while the process that made it lives."""
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (open for as long as this lives)

    @classmethod
    def make(cls) -> Self:
        """For the node's own process, which keeps it."""
        return cls(Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('pulses')}"))

    def write(self, slot: int, pulse: Pulse | None) -> None:
        """`slot`: of the rank among those of its node. None: from now on nobody waits for it."""
        text = json.dumps(pulse and asdict(pulse)).encode()
        assert len(text) <= _SLOT
        os.pwrite(self._file.fileno(), text.ljust(_SLOT), slot * _SLOT)

    def read(self) -> dict[int, Pulse]:
        """The pulses by slot, without one that is being written at this moment."""
        text = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        found = {}
        for slot in range(len(text) // _SLOT):
            try:
                facts = json.loads(text[slot * _SLOT : (slot + 1) * _SLOT].strip(b"\0 ") or "null")
            except ValueError:  # half of it is of another look; a rank that is stopped writes nothing
                continue
            if facts:
                found[slot] = Pulse(**facts)
        return found


class NodeWatch:
    """Speaks for ranks that are late and of whom no watchdog speaks: all may be stopped, or wait for a file system.

    Touches no shared file; `verdict` and `gave_up` are for the one that does.
    """

    def __init__(self, pulses: Pulses, host: str) -> None:
        self._pulses, self._host = pulses, host
        self._quiet = False
        self._seen: dict[int, Pulse] = {}
        self._unchanged: dict[int, float] = {}
        self._looked = time.monotonic()
        self._spoke: float | None = None
        self.verdict = ""
        """What was said last."""
        self.gave_up = False
        """Whether the ranks did not move in their time of grace either."""

    def start(self) -> Self:
        """Looks from now on, in a thread."""
        threading.Thread(target=self._run, name="pulses", daemon=True).start()
        return self

    def somebody_spoke(self) -> None:
        """A watchdog has, just now; there is nothing to add until the ranks move again."""
        self._quiet = True

    def _run(self) -> None:
        while not self.gave_up:
            time.sleep(_TICK)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Looks once at all ranks. `now` is of the monotonic clock."""
        pulses = self._pulses.read()
        # Whoever stops a whole node stops this process too; that time does not count.
        passed, self._looked = min(now - self._looked, 5 * _TICK), now
        self._unchanged = {
            slot: self._unchanged[slot] + passed if self._seen.get(slot) == pulse else 0.0
            for slot, pulse in pulses.items()
        }
        self._seen = pulses
        late = {slot: self._unchanged[slot] - pulse.left for slot, pulse in pulses.items()}
        worst = max(late.values(), default=0.0)
        if worst <= 0:
            self._quiet, self._spoke = False, None
        elif self._spoke is None and worst > _LATE and not self._quiet:
            self._spoke = now
            self._speak(pulses, late)
        elif self._spoke is not None:
            graces = [pulse.grace for pulse in pulses.values() if pulse.grace is not None]
            self.gave_up = bool(graces) and now - self._spoke > max(graces)

    def _speak(self, pulses: dict[int, Pulse], late: dict[int, float]) -> None:
        worst, when = max(late, key=late.__getitem__), time.strftime("%Y-%m-%d %H:%M:%S")
        headline = (
            f"hang: {when} {pulses[worst].activity} takes {late[worst]:.0f} s longer than it may, and no watchdog has "
            f"spoken; {self._host} sees of its ranks:"
        )
        ranks = [
            f"rank {one.rank} on {self._host}, {one.activity}; process {one.pid}: {process_state(one.pid)}"
            for one in pulses.values()
        ]
        text = "\n".join([headline, *ranks])
        self.verdict = text + "\n"
        say(text)
