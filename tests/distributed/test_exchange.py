"""Attention by exchange against attention over the whole sequence on one rank, in the cases that also try the ring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.sequence
from model.kernels import KERNELS, Documents
from parallel.exchange import ExchangeAttention
from parallel.exchange_plan import exchange_plan
from parallel.sequence import balanced_parts, causal_parts, document_rows
from parallel.transport import MessageTransport, Place, Rows
from tests.distributed.context_cases import (
    CASES,
    RINGS,
    SCALE,
    B,
    Case,
    Results,
    S,
    full_inputs,
    local_part,
    on_rings,
    relative_errors,
    worst,
)
from tests.distributed.harness import run_distributed

VARIANTS = {
    "keys kept": {"joined": True},
    "keys fetched again": {"joined": True, "keep_gathered": False},
    "two calls": {"joined": False},
    "balanced": {"balanced": True, "joined": True},
    "balanced for layers without a window, two calls": {"balanced": True, "joined": False, "cut_by_window": False},
}


def part_of(full: Tensor, group: dist.ProcessGroup, case: Case, variant: dict[str, bool]) -> Tensor:
    """This rank's tokens of [B, S, ...]."""
    documents, window = case.documents(), case.window if variant.get("cut_by_window", True) else None
    if "balanced" not in variant:
        return local_part(full, group)
    if documents is None:
        rows_of_a_call = 1 if variant["joined"] else B
        part = causal_parts(S, group.size(), case.heads * rows_of_a_call, window)[dist.get_rank(group)]
        return torch.cat([full[:, start:stop] for start, stop in part], dim=1)
    rows = zip(full, document_rows(documents.boundaries, B, S), strict=True)
    parts = [(row, balanced_parts(S, group.size(), bounds, window)) for row, bounds in rows]
    mine = [(row, part[dist.get_rank(group)]) for row, part in parts]
    return torch.stack([torch.cat([row[start:stop] for start, stop in part]) for row, part in mine])


def results_of(
    attend: ExchangeAttention, part: Callable[[Tensor], Tensor], case: Case, dtype: torch.dtype
) -> list[Tensor]:
    """out, dq, dk, dv of this rank's part."""
    local = [part(full).to(dtype) for full in full_inputs(case)]
    q, k, v = (tensor.requires_grad_() for tensor in local[:3])
    if case.lengths or not attend.plans.joined:
        out = attend(q, k, v, case.documents())
    else:  # rows of a batch without documents are not joined
        out = torch.cat([attend(*rows, None) for rows in zip(*(x.split(1) for x in (q, k, v)), strict=True)])
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), local[3])]


def make(group: dist.ProcessGroup, case: Case, kernel: str, **variant: int) -> ExchangeAttention:
    return ExchangeAttention(MessageTransport(group), KERNELS[kernel], scale=SCALE, window=case.window, **variant)


def _errors() -> Results:
    def measure(size: int, group: dist.ProcessGroup) -> Results:
        found: Results = {}
        for (name, case), (label, variant) in itertools.product(CASES.items(), VARIANTS.items()):
            for kernel, dtype in (("math", torch.float64), ("cpu", torch.float32)):
                if kernel == "cpu" and label != "keys kept":
                    continue
                part = partial(part_of, group=group, case=case, variant=variant)
                results = results_of(make(group, case, kernel, **variant), part, case, dtype)
                found[size, name, label, kernel] = relative_errors(results, case, part)
        return found

    # So that short sequences are not cut in zigzag, and as many query heads decide as there are.
    with mock.patch.multiple(parallel.sequence, _TILE=5, _SECOND_CHUNK=100, _FETCHED=0):
        return on_rings(measure)


@pytest.fixture(scope="module")
def errors() -> Results:
    return worst(run_distributed(_errors, 8))


@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize(("kernel", "tolerance"), [("math", 1e-12), ("cpu", 1e-5)])
def test_equals_attention_over_the_whole_sequence(errors: Results, size: int, kernel: str, tolerance: float) -> None:
    found = {key: value for key, value in errors.items() if key[0] == size and key[3] == kernel}
    assert len({key[1] for key in found}) == len(CASES)
    for key, tensors in found.items():
        for tensor, error in tensors.items():
            assert error < tolerance, (key, tensor)


def _messages(case: Case, joined: bool) -> list[int]:
    """Elements sent by this rank for one row's forward pass, as counted at the call and as planned."""
    group, sent = dist.group.WORLD, []
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(operation.tensor.numel() for operation in operations if operation.op is dist.isend)
        return original(operations)

    dist.batch_isend_irecv = counting
    q, k, v, _ = (local_part(tensor, group)[:1].float() for tensor in full_inputs(case))
    make(group, case, "math", joined=joined)(q, k, v, None)
    plans = exchange_plan(S, group.size(), dist.get_rank(group), case.window).sends
    tokens = sum(piece.length for pieces in plans.values() for piece in pieces)
    return [sum(sent), tokens * 2 * case.kv_heads * q.shape[-1]]


def _all_messages() -> list[list[int]]:
    windowed, plain = Case(window=5), Case()
    return [_messages(windowed, False), _messages(windowed, True), _messages(plain, False), _messages(plain, True)]


def test_what_is_sent_is_what_was_planned() -> None:
    counted = run_distributed(_all_messages, 4)
    assert all(sent == planned for found in counted for sent, planned in found)
    windowed, *others = (sum(found[number][0] for found in counted) for number in range(4))
    assert 0 < windowed == 6 * 4 * 2 * 2 * 8  # six borders between ranks, a window of 5 - 1
    assert others[0] == windowed and others[1] == others[2], "keys that lie twice travel once"


class FewSlots(MessageTransport):
    """Hands out the same four slots in turn, as peers' memory does, and larger ones, whose like are lost, on demand."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(group)
        self.uses, self.memory = 0, [torch.empty(0)] * 4

    def slot(self, shape: Sequence[int], like: Tensor) -> Tensor:
        size = math.prod(shape)
        if size > len(self.memory[0]):
            for outgrown in self.memory:
                outgrown.fill_(torch.nan)
            self.memory = [torch.empty(size) for _ in range(4)]
        return self.memory[self.uses % 4][:size].view(tuple(shape)).fill_(9)

    def exchange(self, slot: Tensor, rows: Rows, place: Place) -> Any:
        self.uses += 1
        arrival: Any = super().exchange(slot, rows, place)
        while arrival.works:  # the slot may be written again as soon as its turn comes
            arrival.works.pop().wait()
        return arrival


def _many_rows() -> bool:
    """Whether a batch of seven rows with documents of their own is the same in few slots."""
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(dist.get_rank())
    bounds = sorted({row * 32 + cut for row in range(7) for cut in (0, 15 - 2 * row, 25)} | {224})
    documents, found = Documents.from_boundaries(bounds, "cpu"), []
    inputs = [torch.randn(7, 16, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]
    for transport, keep in itertools.product((MessageTransport(group), FewSlots(group)), (True, False)):
        attend = ExchangeAttention(transport, KERNELS["math"], scale=SCALE, keep_gathered=keep)
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs[:3])
        out = attend(q, k, v, documents)
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])])
    return all(torch.equal(one, other) for results in found for one, other in zip(results, found[0], strict=True))


def test_a_transport_needs_few_slots() -> None:
    assert run_distributed(_many_rows, 2) == [True, True]
