"""Lets a fault that one rank meets end all of them with the same words: none waits for a rank that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def raised_on_all_ranks(kind: type[ValueError]) -> Iterator[None]:
    """Around what every rank does: where that raises `kind` on any, all raise it, in the words of the first such rank.

    Collective over the world where the block ends. Any other error leaves at once, on its own rank.
    """
    fault = None
    try:
        yield
    except kind as error:
        fault = str(error)
    faults = [fault] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for said in faults:
        if said is not None:
            raise kind(said)
