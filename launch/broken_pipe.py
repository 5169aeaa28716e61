"""Output into a pipe that may be closed early, as under `| head`. Imports no torch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_on_broken_pipe() -> Iterator[None]:
    """In this block a pipe that nobody reads any more ends the process without a word, as it ends other commands.

    Only around what writes to no socket and no other process: their end must not be this one's. Main thread only.
    """
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and raises BrokenPipeError instead
    try:
        yield
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)
