"""Kernels that take turns on two streams.

An attention kernel leaves more and more multiprocessors idle as it ends: its last blocks are as long as any other. On
another stream the next kernel's blocks move in as they leave, and what is done before and after a kernel (sums, copies,
conversions) runs beside its neighbour. The first stream goes first where both have blocks waiting: otherwise the end of
its work would wait for the second's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class Lanes:
    """Each `turn` runs on the other stream than the one before, after all that the calling stream was given by then.

    The calling stream itself takes no part until `join`: what it waits for meanwhile holds up later turns only. Where
    there is one turn, or no GPU, turns run where they are.
    """

    def __init__(self, device: torch.device, turns: int):
        self._streams = _streams(device) if device.type == "cuda" and turns > 1 else ()
        self._turns = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Runs its body on the next stream."""
        if not self._streams:
            yield
            return
        stream = self._streams[self._turns % len(self._streams)]
        self._turns += 1
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Work issued from now on, on the calling stream, comes after all turns."""
        for stream in self._streams[: self._turns]:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device)
