"""Flags between GPUs that read each other's memory: who may write what, and who may read it.

There is one flag for every slot, owner and reader, stored in the memory of both. The owner raises it when it has filled
its slot; the reader lowers it when it has read the slot. So they take turns, and each side waits for its own copy only.

A GPU's front end sets and awaits flags in the order of a stream (CUDA's stream memory operations), as NCCL's
collectives by copy engine do. Waiting takes no kernel and holds no multiprocessor, and a CUDA graph can record it. Each
method makes one driver call, described beforehand, because such calls are a good part of an exchange's host time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

_UP, _DOWN = 1, 0
_WAIT_FOR_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_AFTER_EARLIER_WRITES = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: behind a fence for the whole system


class Operation(NamedTuple):
    """Writes `value` to `address`, or waits until it is there."""

    writes: bool
    address: int
    value: int


class Batch:
    """Operations that a stream does one after the other."""

    def __init__(self, operations: Iterable[Operation]):
        self.operations = tuple(operations)

    def issue(self, stream: torch.cuda.Stream) -> None:
        if not self.operations:  # of a rank alone
            return
        from cuda.bindings import driver  # comes with torch's CUDA builds only

        (result,) = driver.cuStreamBatchMemOp(stream.cuda_stream, len(self.operations), self._described, 0)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuStreamBatchMemOp failed: {result.name}")

    @cached_property
    def _described(self) -> list[Any]:
        """The operations in the form that the driver takes."""
        from cuda.bindings import driver

        kinds = driver.CUstreamBatchMemOpType
        found = []
        for writes, address, value in self.operations:
            parameters = driver.CUstreamBatchMemOpParams()
            described = parameters.writeValue if writes else parameters.waitValue
            described.operation = (
                kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32 if writes else kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
            )
            described.address, described.value = driver.CUdeviceptr(address), driver.cuuint32_t(value)
            described.flags = _AFTER_EARLIER_WRITES if writes else _WAIT_FOR_EQUAL
            found.append(parameters)
        return found


class Flags:
    """One rank's view of all flags of one slot; each batch is issued on the stream whose work it stands for.

    `pads` are the addresses of every rank's zeroed memory of 8 x slots x ranks bytes, readable by all: torch's signal
    pads, which have to be zero where no exchange is under way.
    """

    def __init__(self, pads: Sequence[int], rank: int, slot: int):
        self.pads, self.rank, self.slot = pads, rank, slot
        peers = [peer for peer in range(len(pads)) if peer != rank]
        self.raise_all = Batch(operation for reader in peers for operation in self._set(_UP, rank, reader))
        """Tells every reader that this rank's slot is filled."""
        self.await_all_lowered = Batch(self._await(_DOWN, rank, reader) for reader in peers)
        """Until every reader has read this rank's slot; not at all before the first time."""
        self.await_raised = {owner: Batch([self._await(_UP, owner, rank)]) for owner in peers}
        """Until the slot of an owner is filled."""
        self.lower = {owner: Batch(self._set(_DOWN, owner, rank)) for owner in peers}
        """Tells an owner that this rank has read its slot."""

    def _set(self, value: int, owner: int, reader: int) -> list[Operation]:
        # One's own copy first: with the other copy set it is the other side's turn to change both.
        other = reader if owner == self.rank else owner
        return [Operation(True, self._address(holder, owner, reader), value) for holder in (self.rank, other)]

    def _await(self, value: int, owner: int, reader: int) -> Operation:
        return Operation(False, self._address(self.rank, owner, reader), value)

    def _address(self, holder: int, owner: int, reader: int) -> int:
        """The address of the copy that `holder`, the owner or the reader, has."""
        ranks = len(self.pads)
        word = 2 * self.slot * ranks + reader if holder == owner else (2 * self.slot + 1) * ranks + owner
        return self.pads[holder] + 4 * word
