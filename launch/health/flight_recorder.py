"""Asks torch's flight recorders which collectives of this rank are not over. gloo and NCCL have one each.

They are read through torch's own debug server (the one behind `torch.distributed.debug`), over a socket of this
process. Its threads do not need Python's lock. That matters because NCCL's recorder asks the device's driver what is
over: a driver that hangs must not block the thread that asks.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d

_RECORDERS = ("fr_trace_json", "dump_nccl_trace_json")
_SECONDS = 3.0
"""For one answer; a sound recorder takes a hundredth."""


@dataclass(frozen=True)
class Flight:
    """The collectives of one rank."""

    last: dict[str, int] = field(default_factory=dict)
    """Process group, as torch calls it -> number of the last collective that the rank has called in it."""
    unfinished: list[str] = field(default_factory=list)
    """Collectives and messages that are not over, in the order in which they were called."""
    remark: str = ""
    """Why there is nothing to tell, if so."""


def read_flight() -> Flight | None:
    """What the recorders know, or None if one does not answer, as when the device's driver hangs."""
    try:
        return flight_of(_dumps())
    except TimeoutError:
        return None
    except (OSError, RuntimeError, http.client.HTTPException, ValueError) as error:
        return Flight(remark=f"torch's flight recorder cannot be read ({error})")


def flight_of(dumps: Iterable[Mapping[str, Any]]) -> Flight:
    """From the recorders' own form."""
    last: dict[str, int] = defaultdict(int)
    unfinished: list[tuple[int, str]] = []
    for entry in chain.from_iterable(dump.get("entries", []) for dump in dumps):
        group, described = entry["process_group"]
        if described not in ("", "undefined"):
            group = f"{group} ({described})"
        number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
        if not entry["is_p2p"]:
            last[group] = max(last[group], number)
        # gloo's are retired without ever being completed; NCCL's may be completed and not yet retired.
        if not entry["retired"] and entry["state"] != "completed":
            name = entry["profiling_name"].partition(":")[2]
            unfinished.append((entry["time_created_ns"], f"{name} number {number} in group {group}"))
    return Flight(dict(last), [what for _, what in sorted(unfinished)])


def _dumps() -> list[dict[str, Any]]:
    """Raises TimeoutError where a recorder does not answer, and whatever else keeps it from being asked."""
    questions = [name for name in _RECORDERS if name in c10d._get_handler_names()]  # type: ignore[attr-defined]
    if not questions:
        return []
    with tempfile.TemporaryDirectory(prefix="flight-") as folder:  # open to this user alone
        path = Path(folder) / "s"
        server = c10d._WorkerServer(str(path))
        try:
            found = [_ask(path, question) for question in questions]
        except Exception:
            # It stays for ever: to clear away one that has not answered would wait for it, with Python's lock.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))
            raise
        server.shutdown()
    return found


def _ask(path: Path, question: str) -> dict[str, Any]:
    with closing(_Connection(path)) as connection:
        connection.request("POST", f"/handler/{question}")
        answer = connection.getresponse()
        text = answer.read()
    if answer.status != http.client.OK:
        raise ValueError(f"{question}: {answer.status} {text[:200].decode(errors='replace')}")
    return dict(json.loads(text))


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SECONDS)
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                return self.sock.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):  # it listens in a moment
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)
