"""One rank of a world by itself, whose messages arrive at once: its peers are taken to send what it sends itself.

Kernels, memory and the host's work are those of a rank among its peers. So what they take together is longer by what
their messages cost, and what fits here fits there if NCCL's own buffers do. The numbers mean nothing, but they are of
the right size: zeros would be multiplied faster.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import peer_flags, transport, zero, zero_shares

RANKS_OF_A_HOST = 8


@contextmanager
def alone(ranks: int) -> Iterator[None]:
    """This process is rank 0 of `ranks`, eight to a host. Makes and destroys the process group."""
    dist.Backend.register_backend(
        "free", lambda _store, rank, size, _timeout: FreeMessages(rank, size), devices=["cpu", "cuda"]
    )
    dist.init_process_group("free", store=dist.HashStore(), rank=0, world_size=ranks)
    with (
        mock.patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}),
        mock.patch.object(transport, "reach_each_other", _of_one_host),
        mock.patch.object(zero, "reach_each_other", _of_one_host),
        mock.patch.object(transport, "PeerMemory", OwnMemory),
        mock.patch.object(zero_shares, "PeerMemory", OwnMemory),
        nobody_waits(),
        _seen_by_the_compiler(),
    ):
        yield
    dist.destroy_process_group()


@contextmanager
def _seen_by_the_compiler() -> Iterator[None]:
    """Compiled code takes a group's size for a constant. Torch's compiler does so for groups of torch's own class only;
    here for these."""
    from torch._dynamo.variables import distributed

    if hasattr(distributed, "ProcessGroupVariable"):  # before torch 2.13
        with mock.patch.object(
            distributed.ProcessGroupVariable, "is_process_group", lambda value: isinstance(value, FreeMessages)
        ):
            yield
    else:
        from torch._library import opaque_object
        from torch.distributed import device_mesh

        device_mesh._register_distributed_opaque_types()
        known = opaque_object._OPAQUE_TYPES
        if FreeMessages not in known:
            opaque_object.register_opaque_type(FreeMessages, typ="reference", members=known[dist.ProcessGroup].members)
        yield


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Flags in peers' memory are raised and lowered, and nobody waits for one."""
    issue = peer_flags.Batch.issue

    def issue_writes(batch: peer_flags.Batch, stream: torch.cuda.Stream) -> None:
        if all(operation.writes for operation in batch.operations):
            issue(batch, stream)

    with mock.patch.object(peer_flags.Batch, "issue", issue_writes):
        yield


def _of_one_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    return device.type == "cuda" and group.size() <= RANKS_OF_A_HOST


class OwnMemory:
    """`PeerMemory` of which every rank's is this one's."""

    def __init__(self, size: int, device: torch.device, group: dist.ProcessGroup):
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        # What a peer would write here is plausible: it may not be zeros, nor what was last in this memory.
        self._memory[: size // 2 * 2].view(torch.bfloat16).normal_(std=1e-3)
        self._flags = torch.zeros(256, dtype=torch.int32, device=device)
        self.signal_pads = [self._flags.data_ptr()] * group.size()

    def view(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> Tensor:
        return self._memory.view(dtype)[start:].as_strided(shape, torch.empty(shape, device="meta").stride())


class Done(dist.Work):
    """A message that the current stream has been given: whoever waits comes after it."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self._event = torch.cuda.current_stream().record_event() if any(one.is_cuda for one in tensors) else None
        self._future: torch.futures.Future[Sequence[Tensor]] = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: Any = None) -> bool:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Sequence[Tensor]]:
        return self._future


class FreeMessages(dist.ProcessGroup):
    """Every rank sends what this one does. Its copies move as many bytes within the GPU as arriving messages would."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)  # type: ignore[call-arg] # without a store, as groups of Python are made
        self._rank, self._size = rank, size
        self._sent: list[weakref.ref[Tensor]] = []

    def getBackendName(self) -> str:  # noqa: N802 - c10d's name
        return "free"

    @property
    def group_name(self) -> str:
        """What the world calls it: c10d itself tells only groups of its own."""
        return dist.distributed_c10d._world.pg_names[self]

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Done:
        for tensor in tensors:
            self._reduce(tensor, tensor, opts)
        return Done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Done:
        return Done(tensors)

    def barrier(self, opts: Any = None) -> Done:
        return Done([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Done:
        for places, tensor in zip(outputs, inputs, strict=True):
            for place in places:
                _copy(place, tensor)
        return Done(inputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Done:
        return self.allgather([list(output.view(-1).chunk(self._size))], [tensor.view(-1)])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor)
        return Done(inputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Done:
        for output, parts in zip(outputs, inputs, strict=True):
            self._reduce(output, parts[self._rank], opts)
        return Done(outputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Done:
        return self.reduce_scatter([output.view(-1)], [list(tensor.view(-1).chunk(self._size))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return Done(outputs)

    # Their names before torch 2.13.
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base, reduce_scatter_tensor_coalesced = reduce_scatter_single, reduce_scatter_single_coalesced

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Done:
        self._sent += map(weakref.ref, tensors)  # to keep them would take memory that peers would not
        return Done(tensors)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Done:
        """What was sent first, has not been received and is still held by its sender; zeros beyond it."""
        for tensor in tensors:
            sent = None
            while sent is None and self._sent:
                sent = self._sent.pop(0)()
            sent = tensor.new_empty(0) if sent is None else sent
            arrived = sent.reshape(-1)[: tensor.numel()]
            tensor.view(-1)[: len(arrived)].copy_(arrived)
            tensor.view(-1)[len(arrived) :].zero_()
        return Done(tensors)

    def _reduce(self, output: Tensor, tensor: Tensor, opts: Any) -> None:
        operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        if operation in (dist.ReduceOp.AVG, dist.ReduceOp.MIN, dist.ReduceOp.MAX):  # of equals
            _copy(output, tensor)
        else:
            torch.mul(tensor, self._size, out=output)


def _copy(place: Tensor, tensor: Tensor) -> None:
    if place.data_ptr() != tensor.data_ptr():
        place.copy_(tensor)
