"""Where the ranks of a job meet: waiting for each other aloud, and not for ever where they cannot."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistNetworkError, DistStoreError

from launch.environment import Place, node_name
from launch.warning_filters import ignore_warnings_of_dependencies
from parallel.zero import initialize_distributed

_SAID_AFTER_SECONDS = 10.0
"""How long a name may be unknown before this is said: a node that has just been started may not have its name yet."""
_NAMELESS_SECONDS = 300.0
"""How long it may be unknown at all."""
_ALONE_SECONDS = 60.0
"""How long the other ranks may be away before this is said; torch gives up after half an hour."""


class NobodyMet(ValueError):
    """A rank that cannot find the others; the message says where it looked."""


def join_world(device_type: str, place: Place) -> None:
    """Meets the other ranks. Raises NobodyMet."""
    ignore_warnings_of_dependencies()
    _wait_for_name(place)
    here = f"rank {place.rank} on {node_name()}"
    where = f"{place.master_address}:{place.master_port} (MASTER_ADDR:MASTER_PORT)"
    alone = (
        f"{here} has waited {_ALONE_SECONDS:.0f} s for the other ranks at {where}: not all {place.world_size} have "
        "been started, or a firewall is between them"
    )
    with _said_after(_ALONE_SECONDS, alone, place):
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
    """Says `text` if the block takes longer."""
    timer = threading.Timer(seconds, _warn, [text, place])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _warn(text: str, place: Place) -> None:
    """Once a node."""
    if not place.local_rank:
        print(f"warning: {text}", file=sys.stderr, flush=True)
