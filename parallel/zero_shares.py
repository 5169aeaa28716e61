"""Gathers stage 3's parameters on GPUs of one host: each rank reads the others' shares where they lie, by copy engine.
A kernel of NCCL's would hold multiprocessors.

Shapes: P ranks of dp x cp, N elements of a parameter, C = ceil(N / P) elements of each rank's share of it, M elements
of a rank's shares of all parameters.

A share changes once a step. So ranks need not synchronise at each gathering, as messages do. They synchronise before a
change, when everybody has read the old values, and after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from parallel.peer_memory import PeerMemory
from parallel.zero_stage3 import Gathering, begin_gathering


class SharesInReach:
    """Stage 3's working copies of the parameters, moved to where all ranks of `group` read them."""

    def __init__(self, model: nn.Module, optimizer: Any, group: ProcessGroup):
        """Collective over `group`, whose GPUs must `reach_each_other`."""
        old = optimizer.lp_param_buffer
        self._memory = PeerMemory(old.nbytes, old.device, group)
        views = [self._memory.view(rank, (len(old),), old.dtype) for rank in range(group.size())]
        own = views[group.rank()]
        parameters: list[Any] = list(model.parameters())
        shares = [(parameter, parameter.ds_tensor) for parameter in parameters]
        self._group, self._views = group, views
        self._starts = {parameter.ds_id: share.storage_offset() - old.storage_offset() for parameter, share in shares}
        self._meeting = torch.zeros(1, device=old.device)
        self._last_read = _Read(old.device)
        own.copy_(old)
        # As DeepSpeed itself moves them, to the host and back (`reload_states`).
        optimizer.lp_param_buffer.data = own
        optimizer.fp16_partitioned_groups_flat.clear()
        optimizer._set_fp16_partitioned_groups_flat()
        for parameter, share in shares:
            share.data = own.narrow(0, self._starts[parameter.ds_id], share.numel())
            parameter.all_gather_coalesced = self._gather
        self._meet()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what changes this rank's shares: it begins once every rank has read what it was asked to gather, and
        what is gathered after it is read once every rank has changed its own. The host waits for neither.

        Collective.
        """
        self._last_read.wait()
        self._meet()
        yield
        self._meet()

    def _meet(self) -> None:
        """The current stream goes on once those of all ranks are here."""
        dist.all_reduce(self._meeting, group=self._group)

    def _gather(self, parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Gathering:
        assert not quantize, "shares are read as they are"
        parameters = begin_gathering(parameters)
        wholes = []
        for parameter in parameters:
            start, length = self._starts[parameter.ds_id], parameter.partition_numel()
            whole = self._views[0].new_empty(self._group.size() * length)
            for view, place in zip(self._views, whole.split(length), strict=True):
                place.copy_(view[start : start + length], non_blocking=True)
            wholes.append(whole)
        self._last_read = _Read(self._meeting.device)
        return Gathering(parameters, wholes, self._last_read)


class _Read:
    """What the current stream has read by now."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> None:
        """Lets the current stream wait for it, not the host."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
