"""Parameters gathered by reading every rank's share where it lies, by copy engine: no kernel of NCCL's holds SMs.

Shapes: P ranks of dp x cp, N elements of a parameter, C = ceil(N / P) elements of each rank's share of it, M elements
of a rank's shares of all parameters.

A share changes once a step. So peers need not be met at each gathering, as messages do: they are met before a change,
when everybody has read what was there, and after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.zero_stage3 import Gathering, after_computing, begin_gathering


def symmetric_views(shares: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Memory like `shares` [M] of every rank, this one's too, that this rank reads and writes. Collective; for GPUs of
    one host that reach each other (`SymmetricTransport.reaches`). Torch's allocator does not count it."""
    memory = symmetric_memory.empty(shares.numel(), dtype=shares.dtype, device=shares.device)
    handle = symmetric_memory.rendezvous(memory, group)
    return [handle.get_buffer(rank, (shares.numel(),), shares.dtype, 0) for rank in range(group.size())]


class SharesInReach:
    """Stage 3's working copies of the parameters, moved to where all ranks of `group` read them."""

    def __init__(self, model: nn.Module, optimizer: Any, group: ProcessGroup, views: Sequence[Tensor]):
        """`views[rank]` [M] is the memory of that rank as this one sees it. Collective over `group`."""
        old, own = optimizer.lp_param_buffer, views[group.rank()]
        parameters: list[Any] = list(model.parameters())
        shares = [(parameter, parameter.ds_tensor) for parameter in parameters]
        self._group, self._views = group, views
        self._starts = {parameter.ds_id: share.storage_offset() - old.storage_offset() for parameter, share in shares}
        self._meeting = torch.zeros(1, device=old.device)
        self._last_read: torch.cuda.Event | None = None
        own.copy_(old)
        # As DeepSpeed itself moves them, to the host and back (`reload_states`).
        optimizer.lp_param_buffer.data = own
        optimizer.fp16_partitioned_groups_flat.clear()
        optimizer._set_fp16_partitioned_groups_flat()
        for parameter, share in shares:
            share.data = own.narrow(0, self._starts[parameter.ds_id], share.numel())
            parameter.all_gather_coalesced = partial(self._gather, parameter.all_gather_coalesced)
        self.changed()

    def before_change(self) -> None:
        """The current stream goes on once every rank has read what it was asked to gather."""
        if self._last_read is not None:
            torch.cuda.current_stream().wait_event(self._last_read)
        dist.all_reduce(self._meeting, group=self._group)

    def changed(self) -> None:
        """The current stream, and what is gathered after it, goes on once every rank has changed its shares."""
        dist.all_reduce(self._meeting, group=self._group)

    def _gather(self, theirs: Any, parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
        parameters = begin_gathering(parameters)
        after_computing(self._meeting.device)
        wholes = []
        for parameter in parameters:
            start, length = self._starts[parameter.ds_id], parameter.partition_numel()
            whole = torch.empty(self._group.size() * length, dtype=self._views[0].dtype, device=self._views[0].device)
            for view, place in zip(self._views, whole.split(length), strict=True):
                place.copy_(view[start : start + length], non_blocking=True)
            wholes.append(whole)
        if self._meeting.is_cuda:
            self._last_read = torch.cuda.current_stream().record_event()
        return Gathering(parameters, wholes, self._last_read)
