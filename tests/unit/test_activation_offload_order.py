"""What orders the copies of activations on a GPU: real forward and backward passes whose streams are the model's. What
one stream writes and another one reads, overwrites or frees must be ordered by events, whatever their pace."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from model.recompute import Recompute
from parallel.activation_offload import ActivationOffload, _Block, _Parked
from tests.unit.test_activation_offload import CPU, build, loss_of
from tests.unit.test_transport import Host, Stream


class Watched(ActivationOffload):
    """Copies on a stream of the model's, and notes which operation did what to which tensor."""

    def __init__(self, host: Host):
        super().__init__(CPU)
        self.host, self._stream = host, Stream(host)  # type: ignore[assignment]
        self.notes: list[tuple[int, str, int, int]] = []
        """Operation, what it does, to which parked tensor, and its buffer."""
        self.numbers: dict[int, int] = {}

    def note(self, kind: str, parked: _Parked) -> None:
        """Of the operation that was issued last."""
        number = self.numbers.setdefault(id(parked), len(self.notes))
        self.notes.append((len(self.host.issued) - 1, kind, number, parked.buffer.data_ptr()))

    def compute(self, kind: str, parked: _Parked) -> None:
        self.host.main.issue(kind)
        self.note(kind, parked)

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        parked = super().pack(tensor)
        if isinstance(parked, _Parked):
            self.note("leaves", parked)
            number, buffer = self.numbers[id(parked)], parked.buffer.data_ptr()

            def freed(address: int = id(parked)) -> None:
                self.host.main.issue("free")
                self.notes.append((len(self.host.issued) - 1, "free", number, buffer))
                del self.numbers[address]

            weakref.finalize(parked, freed)
        return parked

    def unpack(self, parked: Tensor | _Parked) -> Tensor:
        tensor = super().unpack(parked)
        if isinstance(parked, _Parked):
            self.compute("use", parked)
        return tensor

    def _leave(self, block: _Block) -> None:
        here = [parked for parked in block.alive() if parked.on_device is not None]
        super()._leave(block)
        for parked in here:
            self.compute("free", parked)

    def _call_back(self, parked: _Parked) -> None:
        away = parked.on_device is None
        if away:
            self.compute("allocate", parked)
        super()._call_back(parked)
        if away:
            self.note("returns", parked)


def noted(policy: Recompute) -> tuple[Host, list[tuple[int, str, int, int]]]:
    """Of two micro-batches."""
    host = Host(0, 1)
    store = Watched(host)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        host.current = stream
        yield
        stream.issue("copy")
        host.current = host.main

    current = mock.patch.object(torch.cuda, "current_stream", lambda device: host.current)
    with current, mock.patch.object(torch.cuda, "stream", on):
        model: Any = build(policy, store)
        for seed in range(2):
            host.main.issue("compute")
            loss_of(model, seed).backward()
    return host, store.notes


@pytest.mark.parametrize("policy", ["full", "attention"])
def test_copies_are_ordered_by_events(policy: Recompute) -> None:
    host, notes = noted(policy)
    before: list[set[int]] = []  # all that an operation comes after
    for after in host.after:
        before.append(set().union(after, *(before[one] for one in after)))
    held: dict[int, int] = {}  # the last operation that touched a tensor's memory, or a buffer
    kinds = set()
    for operation, kind, parked, buffer in notes:
        kinds.add(kind)
        if kind == "leaves":  # the stream that computes has just made it
            assert any(host.issued[one][0] is host.main for one in before[operation])
        elif kind != "allocate" and parked in held:
            assert held[parked] in before[operation], f"{kind} may come before what it has to wait for"
        held[parked] = operation
        if kind in ("leaves", "returns"):
            assert held.get(-buffer, operation) in before[operation] | {operation}, "a buffer is used again too early"
            held[-buffer] = operation
    assert kinds == {"leaves", "free", "allocate", "returns", "use"}
