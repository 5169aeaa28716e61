"""Meets the other ranks of a job. It reports a long wait, and gives up if they cannot be found."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import DistNetworkError, DistStoreError

from launch.environment import Place, end_process, node_name
from launch.exit_status import STOPPED
from launch.standard_output import say
from launch.warning_filters import ignore_warnings_of_dependencies
from parallel.zero import initialize_distributed

_SAID_AFTER_SECONDS = 10.0
"""How long a name may be unknown before this is said: a node that has just been started may not have its name yet."""
_NAMELESS_SECONDS = 300.0
"""How long it may be unknown at all."""
_ALONE_SECONDS = 60.0
"""How long the other ranks may be away before this is said; torch gives up after half an hour."""
_LAST_SECONDS = 10.0
"""How long a rank that is asked to stop still waits for the others: they may be there in a moment, and all stop
together. Where this node does not know where to wait, nobody will be."""


class NobodyMet(ValueError):
    """A rank that cannot find the others; the message says where it looked."""


def join_world(device_type: str, place: Place, stop: Callable[[], bool] = lambda: False) -> None:
    """Meets the other ranks. Raises NobodyMet. Where `stop()` comes true and they are away, the process ends."""
    ignore_warnings_of_dependencies()
    with _ended_by(stop, 0.0, place):
        _wait_for_name(place)
    here = f"rank {place.rank} on {node_name()}"
    where = f"{place.master_address}:{place.master_port} (MASTER_ADDR:MASTER_PORT)"
    alone = (
        f"{here} has waited {_ALONE_SECONDS:.0f} s for the other ranks at {where}: not all {place.world_size} have "
        "been started, or a firewall is between them"
    )
    with _said_after(_ALONE_SECONDS, alone, place), _ended_by(stop, _LAST_SECONDS, place):
        try:
            initialize_distributed(device_type)
        except (DistNetworkError, DistStoreError) as error:
            raise NobodyMet(
                f"{here} could not meet the other ranks at {where}: {error}; see that all {place.world_size} are "
                "started, that the address is of rank 0's node, and that the port is free there"
            ) from error


def _wait_for_name(place: Place) -> None:
    """Returns when this node knows the name of rank 0's; torch would try for half an hour."""
    begun, said = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(place.master_address, None)
            return
        except OSError as error:
            fault = f"{node_name()} cannot resolve MASTER_ADDR={place.master_address} ({error})"
        waited, remedy = time.monotonic() - begun, "give a name that all nodes know, or the IP address of rank 0's node"
        if waited >= _NAMELESS_SECONDS:
            raise NobodyMet(f"{fault}, nor could it for {_NAMELESS_SECONDS:.0f} s; {remedy}")
        if waited >= _SAID_AFTER_SECONDS and not said:
            _warn(f"{fault}, and goes on trying; {remedy}", place)
            said = True
        time.sleep(1)


@contextmanager
def _said_after(seconds: float, text: str, place: Place) -> Iterator[None]:
    """Warns with `text` if the block takes longer."""
    timer = threading.Timer(seconds, _warn, [text, place])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _ended_by(stop: Callable[[], bool], seconds: float, place: Place) -> Iterator[None]:
    """Ends the process, as a run that stops before its first step, if the block lasts `seconds` longer than `stop`."""
    met = threading.Event()

    def watch() -> None:
        while not met.wait(0.2):
            if stop() and not met.wait(seconds):
                _warn(f"rank {place.rank} on {node_name()} was asked to stop, and ends: it had met nobody yet", place)
                end_process(STOPPED)  # the main thread is inside a call that hears of nothing

    threading.Thread(target=watch, name="stop while joining", daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _warn(text: str, place: Place) -> None:
    """Once a node."""
    if not place.local_rank:
        say(f"warning: {text}", sys.stderr)
