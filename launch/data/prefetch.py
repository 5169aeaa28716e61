"""Loading one step ahead of the training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls load(step) one step ahead, in one background thread, so that reading never stalls a step.

    Asking for another step than the one that was prepared is right, only not faster. An error in load is raised by the
    `get` of its step. Use as a context manager, or call `close`.
    """

    def __init__(self, load: Callable[[int], T], stop: int | None = None) -> None:
        """Steps from `stop` on are never prepared ahead."""
        self._load = load
        self._stop = stop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """load(step); starts load(step + 1) before it returns."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            batch = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            batch = self._thread.submit(self._load, step).result()
        if self._stop is None or step + 1 < self._stop:
            self._ahead = step + 1, self._thread.submit(self._load, step + 1)
        return batch

    def close(self) -> None:
        """Waits for the load in progress, if any; may be called twice."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
