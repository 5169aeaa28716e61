"""Loads one step ahead of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(load: Callable[[int], T], steps: Iterable[int]) -> Iterator[Iterator[T]]:
    """load(step) for each of `steps`, called one step ahead in a background thread, so that reading stalls no step.

    An error in load is raised where its step is asked for, and ends the loading. The end of the block waits for the
    load in progress.
    """

    def loaded() -> Iterator[T]:
        loads = (thread.submit(load, step) for step in steps)  # each submitted when it is asked for
        ahead = next(loads, None)
        while ahead is not None:
            batch = ahead.result()
            ahead = next(loads, None)
            yield batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        yield loaded()
