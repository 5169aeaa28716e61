"""When the memory of gradients that another stream reads is given away."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from parallel import zero_stage2


class Stream:
    """A stream of a GPU as what it has been given, in order."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def record_event(self) -> tuple[Any, ...]:
        return tuple(self.given)

    def wait_event(self, event: tuple[Any, ...]) -> None:
        self.given += event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


def test_gradients_are_freed_once_the_computing_stream_waited_for_their_reader() -> None:
    computing, reading = Stream(), Stream()
    beside = zero_stage2._Beside(reading)  # type: ignore[arg-type]
    made: list[weakref.ref[torch.Tensor]] = []
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda: computing),
        mock.patch.object(torch.cuda, "stream", lambda stream: nullcontext()),
    ):
        for bucket in range(6):
            gradient = torch.empty(1)
            made.append(weakref.ref(gradient))
            computing.given.append(("made", bucket))
            with beside.reading([gradient]):
                assert ("made", bucket) in reading.given
                reading.given.append(("read", bucket))
            del gradient
            freed = [number for number, one in enumerate(made) if one() is None]
            assert freed == list(range(max(0, bucket - 1))), "two buckets are in flight"
            assert all(("read", number) in computing.given for number in freed)
            assert ("read", bucket) not in computing.given, "computing goes on beside it"
        beside.join()
        assert not any(one() for one in made) and ("read", 5) in computing.given
