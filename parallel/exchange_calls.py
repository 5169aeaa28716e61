"""From the plan of an exchange to what a batch does on its device: rows that share a plan, kernel calls, masks.

Shapes: B batch, L = S / P local tokens, H query heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.kernels import AttentionMask, Documents
from parallel.exchange_plan import ExchangeCall, ExchangePlan, exchange_plan, one_call_is_faster
from parallel.sequence import balanced_parts, causal_parts, document_rows


@dataclass(frozen=True)
class PlannedCall:
    """A kernel call with its mask on the device."""

    queries: tuple[slice, slice] | None
    """Rows of the batch and local tokens; None for all."""
    keys: slice | None
    """In the buffer; None for all."""
    mask: AttentionMask
    remote: bool
    """Some of the keys come from other ranks."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows of the batch that share a plan: all of them, or one row with documents of its own."""

    of_batch: slice | None
    """Which rows; None for all."""
    plan: ExchangePlan
    calls: list[PlannedCall]
    """In the order of the plan's."""


class BatchPlans:
    """The plans of one rank's batches: each is made at the batch's first layer and kept for the others.

    `window`, `balanced`, `cut_window` (that of the layers which decided the cut) and `joined` are those of
    `ExchangeAttention`; `takes_documents` says that the kernel does.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        *,
        window: int | None,
        balanced: bool,
        cut_window: int | None,
        joined: bool | None,
        takes_documents: bool,
    ):
        self.size, self.rank, self.window = size, rank, window
        self.balanced, self.cut_window = balanced, cut_window
        self.joined, self.takes_documents = joined, takes_documents
        self._planned_for: Documents | None = None
        self._planned: dict[tuple[int, ...], list[PlannedRows]] = {}
        """Plans by shape: a trade of heads around an exchange has groups of several sizes."""

    def of(self, q: Tensor, documents: Documents | None) -> list[PlannedRows]:
        """The plan of the batch with these queries and documents, part by part of its rows; the same parts on all
        ranks."""
        if self._planned_for is not documents:
            self._planned, self._planned_for = {}, documents
        shape = q.shape[:3]
        if shape not in self._planned:
            self._planned[shape] = self._plan(q, documents)
        return self._planned[shape]

    def _plan(self, q: Tensor, documents: Documents | None) -> list[PlannedRows]:
        size, batch = self.size, q.shape[0]
        length = q.shape[1] * size
        joined = self.joins(q)
        if documents is None:
            # The keys of a batch do not lie one row after the other, as documents would have to.
            parts = causal_parts(length, size, q.shape[2] * batch, self.cut_window) if self.balanced else None
            plan = exchange_plan(length, size, self.rank, self.window, None, parts, joined and batch == 1)
            return [PlannedRows(None, plan, self._calls(plan, None, q))]
        plans = []
        for boundaries in document_rows(documents.boundaries, batch, length):
            parts = balanced_parts(length, size, boundaries, self.cut_window) if self.balanced else None
            plans.append(exchange_plan(length, size, self.rank, self.window, boundaries, parts, joined))
        largest = max(plan.largest_buffer for plan in plans)  # a slot must not outgrow those before it while in use
        rows = []
        for row, plan in enumerate(plans):
            batch_rows = slice(row, row + 1) if batch > 1 else None
            calls = self._calls(plan, batch_rows, q)
            rows.append(PlannedRows(batch_rows, replace(plan, largest_buffer=largest), calls))
        return rows

    def joins(self, q: Tensor) -> bool:
        """Whether one call may serve both chunks of a sequence. Decided by shapes, hence alike on all ranks."""
        if not self.takes_documents:
            return False
        return one_call_is_faster(q.shape[2], q.shape[1]) if self.joined is None else self.joined

    def _calls(self, plan: ExchangePlan, rows: slice | None, q: Tensor) -> list[PlannedCall]:
        calls = []
        for call in plan.calls:
            queries = None
            if rows is not None or call.q_stop - call.q_start < q.shape[1]:
                queries = rows or slice(0, q.shape[0]), slice(call.q_start, call.q_stop)
            keys = slice(call.k_start, call.k_stop) if call.k_stop - call.k_start < plan.buffer_length else None
            calls.append(PlannedCall(queries, keys, self._mask(call, q.device), call.remote))
        return calls

    def _mask(self, call: ExchangeCall, device: torch.device) -> AttentionMask:
        if call.query_bounds is None or call.key_bounds is None:
            offset = (call.k_stop - call.k_start) - (call.q_stop - call.q_start)
            return AttentionMask(causal=True, window=self.window, offset=offset)
        return AttentionMask(
            causal=True,
            window=self.window,
            documents=Documents.from_boundaries(call.query_bounds, device),
            key_documents=Documents.from_boundaries(call.key_bounds, device),
        )
