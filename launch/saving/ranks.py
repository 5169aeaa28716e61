"""Runs an action on all ranks. If it fails on one, no rank waits for it, and all ranks raise the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from launch.saving.checkpoint_names import CheckpointError

T = TypeVar("T")


class Ranks:
    """All ranks of the run, over a group of their own. Every method is collective."""

    def __init__(self, name: str):
        """Collective: makes a process group, on the hosts."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", group_desc=name)

    def everywhere(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank and returns all results. Raises CheckpointError on every rank if any failed."""
        mine: tuple[list[T], str | None]
        try:
            mine = [action()], None
        except Exception as error:
            mine = [], f"rank {self.rank}: {in_words(error)}"
        found: list[tuple[list[T], str | None]] = [mine] * self.world_size
        dist.all_gather_object(found, mine, group=self.group)
        failures = [failure for _, failure in found if failure]
        if failures:
            raise CheckpointError("; ".join(failures))
        return [result for results, _ in found for result in results]

    def on_first(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and returns its result everywhere. Raises CheckpointError everywhere if it failed."""
        results = self.everywhere(lambda: [action()] if self.rank == 0 else [])
        return results[0][0]

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        least = torch.tensor(int(flag))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return bool(least)


def in_words(error: BaseException) -> str:
    """The message of an OSError or of one of our own errors; others get their type in front."""
    return str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
