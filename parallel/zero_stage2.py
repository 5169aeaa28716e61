"""Stage 2 with fewer passes over memory, on GPUs of one host.

DeepSpeed copies gradients into a buffer, divides them there, copies them together, casts them to the type in which they
are all-reduced, and adds this rank's part to its sums: some 30 bytes of memory traffic a gradient. It also lets the
host wait between micro-batches. Here each rank sends each part of its gradients, as they are, to the rank that keeps
that part (`parallel.gradient_exchange`): about 10 bytes. Each function replaces methods of one optimizer by others of
the same name; the numbers change by rounding only.

Shapes: P ranks of dp x cp. Parameters lie one behind the other in a flat tensor, of which each rank keeps one P-th. So
a parameter is kept by one rank or by a few neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.gradient_exchange import add_mean, exchange_parts
from parallel.zero_replacing import clip_in_update, grad_norm, replace

MOST_RANKS = 4
"""A bucket's gradients mostly go to one rank. Beyond so many ranks that one receives more bytes than an all-reduce in
fp32 would move: 2 (P - 1) a gradient of 2 bytes instead of 8 (P - 1) / P."""


def exchange_and_accumulate(optimizer: Any, bucket_size: int) -> None:
    """Sends gradients as they are and adds all ranks' to those of earlier micro-batches in one pass.

    `bucket_size`: elements that go together; a larger parameter goes alone.
    """
    assert optimizer.partition_gradients and not optimizer.cpu_offload
    assert optimizer.gradient_accumulation_dtype == torch.float32
    exchange = _Exchange(optimizer)
    # Else DeepSpeed would make its buffers, and let the host wait for its own stream.
    optimizer.contiguous_gradients = optimizer.overlap_comm = False
    optimizer.reduce_bucket_size = bucket_size
    replace(optimizer, "reduce_ipg_grads", exchange.reduce)
    replace(optimizer, "_use_compact_grad_partition_buffer", lambda group: True)
    replace(optimizer, "_build_compact_grad_partition_buffer", exchange.sums)


class _Exchange:
    """Replaces the reduction of a bucket, and the sums that it adds to."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._sums: dict[int, Any] = {}
        self._make_sums = optimizer._build_compact_grad_partition_buffer
        self._summed: set[int] = set()
        self._beside = _Beside(optimizer.reduction_stream) if optimizer.overlap_comm else _Beside(None)

    def sums(self, group: int) -> Any:
        """This rank's part of the gradients of a group of parameters: the same memory in every step."""
        if group not in self._sums:
            self._sums[group] = self._make_sums(group)
        return self._sums[group]

    def reduce(self, comm_dtype: torch.dtype | None = None) -> None:
        """Empties the bucket. Without `comm_dtype`: at the end of a micro-batch."""
        optimizer = self._optimizer
        for bucket in optimizer.ipg_buckets.values():
            if bucket.params:
                self._exchange(bucket.params)
            bucket.clear()
        if comm_dtype is None and optimizer.is_gradient_accumulation_boundary():
            assert len(self._summed) == len(optimizer.param_dict), "a parameter without gradient keeps its last one"
            self._summed.clear()
            self._beside.join()

    def _exchange(self, bucket: Sequence[tuple[int, int, int]]) -> None:
        """`bucket`: of each parameter its group, its index there, and its number."""
        optimizer, gradients = self._optimizer, []
        for _, _, number in bucket:
            parameter = optimizer.param_dict[number]
            gradients.append(parameter.grad.view(-1))
            parameter.grad = None
            optimizer.params_already_reduced[number] = True
        group = optimizer.dp_process_group
        with self._beside.reading(gradients):
            parts = [
                [gradient[place] for place in self._places(kind, number)]
                for gradient, (kind, _, number) in zip(gradients, bucket, strict=True)
            ]
            for (kind, _, number), received in zip(bucket, exchange_parts(parts, group), strict=True):
                if received.shape[1]:
                    start = optimizer.grad_partition_insertion_offset[kind][group.rank()][number]
                    total = self.sums(kind).flat_partition[start:][: received.shape[1]]
                    add_mean(total, received, first=number not in self._summed)
        self._summed.update(number for _, _, number in bucket)

    def _places(self, kind: int, number: int) -> list[slice]:
        """Which elements of a parameter each rank keeps; the last one's may end beyond it."""
        optimizer = self._optimizer
        places = [slice(0, 0)] * optimizer.dp_process_group.size()
        for rank in optimizer.param_to_partition_ids[kind][number]:
            start = optimizer.grad_start_offset[kind][rank][number]
            room = optimizer.partition_size[kind] - optimizer.grad_partition_insertion_offset[kind][rank][number]
            places[rank] = slice(start, start + room)
        return places


class _Beside:
    """A stream beside the one that computes, on which gradients are read; or the same one, and on CPUs none."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self._stream = stream
        self._read: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()

    @contextmanager
    def reading(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Around what reads `tensors`, which the current stream made: all gradients are made on the one that computes.

        They are kept until the current stream has waited for that. So their memory is given away in its order, and no
        more than `_IN_FLIGHT` of them take memory, however far ahead the host is.
        """
        if self._stream is None:
            yield
            return
        computing = torch.cuda.current_stream()
        if len(self._read) == _IN_FLIGHT:
            done, _ = self._read.popleft()
            computing.wait_event(done)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            yield
        self._read.append((self._stream.record_event(), tensors))

    def join(self) -> None:
        """Lets the current stream wait for what has been read by now."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._read.clear()


_IN_FLIGHT = 2
"""Buckets whose gradients are on their way while the next are computed."""


def measure_norm_once(optimizer: Any) -> None:
    """One pass over the gradients tells their norm, and whether they are finite. DeepSpeed makes about five."""
    replace(optimizer, "get_grad_norm_direct", partial(_norm_without_padding, optimizer))
    # A norm that is not finite skips the update too.
    replace(optimizer, "has_overflow", lambda partition_gradients=True: False)


def _norm_without_padding(optimizer: Any, gradients: Sequence[Tensor], parameters: Sequence[Any]) -> Tensor:
    unmarked = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    counted = unmarked[: len(parameters)]  # padding at the end is not always marked
    return grad_norm(optimizer, counted or gradients, parameters)  # padding alone where no parameter is kept


def clip_as_adamw_reads(optimizer: Any) -> None:
    """Needs the fused AdamW."""
    replace(optimizer, "unscale_and_clip_grads", partial(clip_in_update, optimizer))
