"""Flags between GPUs that read each other's memory: who may write what, and who may read it.

For every slot, owner and reader there is one flag, in the memory of both: up from the moment the owner has filled its
slot until the reader has read it. So only the owner raises it and only the reader lowers it, in turns, and each side
waits for its own copy alone.

A GPU's front end sets and awaits flags in the order of a stream (CUDA's stream memory operations), as NCCL's
collectives by copy engine do: waiting takes no kernel and holds no multiprocessor, and a CUDA graph can record it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_UP, _DOWN = 1, 0
_WAIT_FOR_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_AFTER_EARLIER_WRITES = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: behind a fence for the whole system


class Flags:
    """One rank's view of all flags; each method works on the current stream.

    `pads` are the addresses of every rank's zeroed memory of 8 x slots x ranks bytes, readable by all: torch's signal
    pads, which have to be zero where no exchange is under way.
    """

    def __init__(self, pads: Sequence[int], rank: int):
        self.pads, self.rank = pads, rank

    def raise_(self, slot: int, reader: int) -> None:
        """Tells `reader` that this rank's slot is filled."""
        self._set(_UP, slot, self.rank, reader, other=reader)

    def await_raised(self, slot: int, owner: int) -> None:
        """Until the slot of `owner` is filled."""
        self._await(_UP, slot, owner, self.rank)

    def lower(self, slot: int, owner: int) -> None:
        """Tells `owner` that this rank has read its slot."""
        self._set(_DOWN, slot, owner, self.rank, other=owner)

    def await_lowered(self, slot: int, reader: int) -> None:
        """Until `reader` has read this rank's slot; not at all before the first time."""
        self._await(_DOWN, slot, self.rank, reader)

    def _set(self, value: int, slot: int, owner: int, reader: int, other: int) -> None:
        # One's own copy first: with the other copy set it is the other side's turn to change both.
        for holder in (self.rank, other):
            address = self._address(holder, slot, owner, reader)
            _driver_call("cuStreamWriteValue32", address, value, _AFTER_EARLIER_WRITES)

    def _await(self, value: int, slot: int, owner: int, reader: int) -> None:
        _driver_call("cuStreamWaitValue32", self._address(self.rank, slot, owner, reader), value, _WAIT_FOR_EQUAL)

    def _address(self, holder: int, slot: int, owner: int, reader: int) -> int:
        """Of the copy that `holder`, the owner or the reader, has."""
        ranks = len(self.pads)
        word = 2 * slot * ranks + reader if holder == owner else (2 * slot + 1) * ranks + owner
        return self.pads[holder] + 4 * word


def _driver_call(name: str, address: int, value: int, how: int) -> None:
    from cuda.bindings import driver  # comes with torch's CUDA builds only

    result: tuple[Any, ...] = getattr(driver, name)(torch.cuda.current_stream().cuda_stream, address, value, how)
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} failed: {result[0].name}")
