"""Printing where standard output fails: a pipe that is closed early, as under `| head`, or a full disk. No torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import Any, ParamSpec, TextIO, cast

from launch.exit_status import OUTPUT_LOST

_P = ParamSpec("_P")


def output_matters(command: Callable[_P, int]) -> Callable[_P, int]:
    """For a function whose purpose is what it prints, and that returns an exit status. Main thread only.

    A pipe that nobody reads any more ends the process without a word, as it ends other commands. Any other failure of
    standard output is one line on standard error, and OUTPUT_LOST is returned. Ctrl-C, too, ends the process without a
    word, once what was begun has been cleared up.
    """

    @wraps(command)
    def guarded(*arguments: _P.args, **options: _P.kwargs) -> int:
        stream = sys.stdout
        if stream is None:  # closed from the start
            return command(*arguments, **options)
        try:
            with redirect_stdout(cast(TextIO, _Guarded(stream))):
                try:
                    status = command(*arguments, **options)
                except SystemExit:  # after --help
                    sys.stdout.flush()
                    raise
                sys.stdout.flush()
                return status
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            raise
        except _OutputLost as lost:
            _discard(stream)
            if isinstance(lost.why, BrokenPipeError):
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGPIPE)
            print(
                f"error: standard output cannot be written ({lost.why}); what was to be said is lost, "
                "what was done is not",
                file=sys.stderr,
            )
            return OUTPUT_LOST

    return guarded


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints what matters less than the work it is about: a full disk under the log is no reason to end that.

    `stream`: standard output by default. In one piece, so that lines of other threads come before or after it.
    """
    with suppress(OSError):
        print(text + "\n", end="", file=stream, flush=True)


class _OutputLost(Exception):
    """No OSError: a command answers those of the files it reads and writes itself."""

    def __init__(self, why: OSError):
        super().__init__(str(why))
        self.why = why


class _Guarded:
    """A text stream whose failures are _OutputLost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with _failures_told():
            return self._stream.write(text)

    def flush(self) -> None:
        with _failures_told():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _failures_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _OutputLost(error) from error


def _discard(stream: TextIO) -> None:
    """Leads the stream nowhere: the interpreter would write what is left in it at its end, and complain."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
