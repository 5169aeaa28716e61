"""When shares of parameters are read and changed, on a model of GPUs: streams are queues, ranks and their streams are
as slow as chance likes, and a share that is read while it changes, before it has changed or after it is an error.

What is run is what `SharesInReach` issues; only memory, streams, events and the collective are the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from parallel import zero_shares, zero_stage3
from parallel.zero_shares import SharesInReach
from tests.unit.test_transport import Host, Stream, one_queue, streams_of

GPU = SimpleNamespace(type="cuda")


class Part:
    """A share, a piece of one, or a place for one: copying from one to another reads it."""

    def __init__(self, host: Host, owner: int):
        self.host, self.owner, self.device, self.nbytes = host, owner, GPU, 8

    def __len__(self) -> int:
        return 4

    def __getitem__(self, where: slice) -> Part:
        return self

    def new_empty(self, size: int) -> Part:
        return Part(self.host, -1)

    def split(self, size: int) -> list[Part]:
        return [self] * self.host.ranks

    def view(self, shape: Any) -> Part:
        return self

    narrow = numel = storage_offset = lambda self, *_: 0

    def copy_(self, source: Part, non_blocking: bool = False) -> None:
        if source.owner >= 0:
            self.host.current.issue("read", source.owner, self.host.changes)  # type: ignore[attr-defined]
            self.host.current.issue("has read", source.owner)


def issue(rank: int, size: int, steps: list[list[bool]]) -> Host:
    """What a rank issues: in each step it gathers, and uses at once what it gathered or never (a guess at what comes
    next that was wrong); then it changes its share."""
    host: Any = Host(rank, size)
    gathers, host.changes, meetings = Stream(host), 0, 0

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        host.current = stream
        yield
        host.current = host.main

    def meet(tensor: Any, group: Any) -> None:
        nonlocal meetings
        meetings += 1
        host.current.issue("arrive", meetings)
        host.current.issue("all are here", meetings)

    optimizer = SimpleNamespace(
        lp_param_buffer=Part(host, -1),
        fp16_partitioned_groups_flat=[],
        _set_fp16_partitioned_groups_flat=lambda: None,
    )
    parameter = SimpleNamespace(
        ds_id=0,
        ds_tensor=Part(host, -1),
        ds_status=ZeroParamStatus.NOT_AVAILABLE,
        ds_numel=4,
        ds_shape=(4,),
        device=GPU,
    )
    parameter.partition_numel = parameter.ds_summary = lambda: 4
    model: Any = SimpleNamespace(parameters=lambda: [parameter])
    group: Any = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    memory = SimpleNamespace(view=lambda owner, shape, dtype: Part(host, owner))
    cuda = SimpleNamespace(current_stream=lambda device=None: host.current, default_stream=lambda device: host.main)
    torch = SimpleNamespace(cuda=cuda, zeros=lambda count, device: SimpleNamespace(device=device))
    optimizer.lp_param_buffer.dtype = None
    with (
        mock.patch.object(zero_shares, "torch", torch),
        mock.patch.object(zero_stage3, "torch", torch),
        mock.patch.object(zero_shares, "dist", SimpleNamespace(all_reduce=meet)),
        mock.patch.object(zero_shares, "PeerMemory", lambda *_: memory),
    ):
        shares = SharesInReach(model, optimizer, group)
        for used in steps:
            for is_used in used:
                with on(gathers):
                    gathering = parameter.all_gather_coalesced([parameter])
                    if is_used:
                        gathering.wait()
                if is_used:
                    host.main.wait_stream(gathers)
                    host.main.issue("compute")
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
            with shares.changing():
                host.main.issue("change")
                host.main.issue("changed")
                host.changes += 1
    return host


class Ranks:
    """All ranks' GPUs."""

    def __init__(self, hosts: list[Host], lay_out: Any):
        self.hosts, self.queues = hosts, [lay_out(host) for host in hosts]
        self.done: list[set[int]] = [set() for _ in hosts]
        self.arrived, self.changes = [0] * len(hosts), [0] * len(hosts)
        self.changing: set[int] = set()
        self.reading: list[int] = []
        """Whose shares."""

    def run(self, random: Random) -> None:
        """One operation after the other, as chance has it."""
        while possible := [
            (rank, queue) for rank, of in enumerate(self.queues) for queue in of if queue and self._can(rank, *queue[0])
        ]:
            # Mostly the first rank that can, or the last: such are far ahead of the others.
            rank, queue = random.choice((possible[0], possible[-1], random.choice(possible)))
            identity, operation = queue.pop(0)
            self.done[rank].add(identity)
            self._do(rank, *operation)
        assert not any(queue for of in self.queues for queue in of), "all ranks wait"

    def _can(self, rank: int, identity: int, operation: Any) -> bool:
        here = operation[0] != "all are here" or min(self.arrived) >= operation[1]
        return here and self.hosts[rank].after[identity] <= self.done[rank]

    def _do(self, rank: int, kind: str, *what: int) -> None:
        if kind == "arrive":
            (self.arrived[rank],) = what
        elif kind == "change":
            assert rank not in self.reading, "a share changes while it is read"
            self.changing.add(rank)
        elif kind == "changed":
            self.changing.remove(rank)
            self.changes[rank] += 1
        elif kind == "read":
            owner, changes = what
            assert owner not in self.changing, "a share is read while it changes"
            assert self.changes[owner] == changes, "a share of another step is read"
            self.reading.append(owner)
        elif kind == "has read":
            self.reading.remove(what[0])


@pytest.mark.parametrize("lay_out", [streams_of, one_queue])
def test_shares_are_those_of_the_step_and_nobody_waits_for_ever(lay_out: Any) -> None:
    for seed in range(200):
        random = Random(seed)
        size = random.randint(2, 4)
        steps = [[random.random() < 0.7 for _ in range(random.randint(0, 3))] for _ in range(3)]
        Ranks([issue(rank, size, steps) for rank in range(size)], lay_out).run(random)
