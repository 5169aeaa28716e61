"""Context-parallel attention by heads (DeepSpeed-Ulysses, arXiv:2309.14509), alone or around another operator.

Shapes: B batch, L local tokens, U group size, T = U x L tokens of the group, H query heads, K key/value heads, D
head_dim, w heads that one rank attends with at a time, of all the tensors that travel together.

The ranks of the group trade their parts of all heads for all of the group's tokens of some heads, attend, and trade
back. The inner operator sees its tokens in the order of positions. If the group is all of context parallelism, that is
the whole sequence: its mask, packed documents and window need nothing more, and its kernel works on one long call,
where it is fastest. Around a ring or an exchange over R groups, the tokens are those of one rank in zigzag order of R.

While the inner operator works on one group of heads the others travel. Only the first arrival and the last departure
are exposed, so the first and the last group are the smallest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from model.kernels import AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets
from parallel.copy_engine import copy_rows
from parallel.fused import Heads, pack_heads, unpack_heads
from parallel.transport import Arrival, Transport


class UlyssesAttention(AttentionOperator):
    """Causal self-attention of tokens spread over the transport's group (zigzag, see `parallel.sequence`).

    The K / U key/value heads of a rank travel in `head_groups` groups (`group_sizes`), each with its query heads. What
    was gathered is kept for the backward pass.
    """

    def __init__(self, transport: Transport, inner: AttentionOperator, *, head_groups: int = 1):
        super().__init__()
        self.transport, self.inner, self.head_groups = transport, inner, head_groups
        self.size, self.rank = transport.group.size(), transport.rank

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (q.numel() // q.shape[3],), (2 * q.numel() + 2 * k.numel(),)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty(q.shape) if out is None else out
        (lse_shape, kept_shape), dtype = self.saved_shapes(q, k), torch.promote_types(q.dtype, torch.float32)
        lse, kept = q.new_empty(lse_shape, dtype=dtype), q.new_empty(kept_shape)
        there, back = _Trade(self, (q, k, v), k), _Trade(self, (out,), k)
        inputs, outputs = kept.split([there.numel, back.numel])
        wholes, kept_outputs, lse_by_group = there.by_group(inputs), back.by_group(outputs), back.lse_by_group(lse)
        arrivals = there.gather(wholes)
        returning = []
        for group, arrival in enumerate(arrivals):
            arrival.wait()
            slot = back.slot(group)
            whole_q, whole_k, whole_v = there.split(wholes[group], group)
            _, part, _ = self.inner.forward(whole_q, whole_k, whole_v, documents, out=slot.transpose(0, 1))
            returning.append(back.send(slot, group))
            lse_by_group[group].copy_(part)
            kept_outputs[group].copy_(slot)
        for arrival in returning:
            arrival.wait()
        return out, lse, kept

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        q, k, v, out, lse, kept, documents = saved
        dq, dk, dv = (
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        )
        there, back = _Trade(self, (dout,), k), _Trade(self, (dq, dk, dv), k)
        wholes = there.by_group(q.new_empty(there.numel))
        arrivals = there.gather(wholes)
        of_inputs, of_outputs = _Trade(self, (q, k, v), k), _Trade(self, (out,), k)
        lse_by_group = of_outputs.lse_by_group(lse)
        inputs, outputs = kept.split([of_inputs.numel, of_outputs.numel])
        kept_inputs, kept_outputs = of_inputs.by_group(inputs), of_outputs.by_group(outputs)
        returning = []
        for group, arrival in enumerate(arrivals):
            arrival.wait()
            [whole_dout] = there.split(wholes[group], group)
            whole_q, whole_k, whole_v = of_inputs.split(kept_inputs[group], group)
            [whole_out] = of_outputs.split(kept_outputs[group], group)
            slot = back.slot(group)
            into_q, into_k, into_v = back.split(slot, group)
            part = Saved(whole_q, whole_k, whole_v, whole_out, lse_by_group[group], q.new_empty(0), documents)
            self.inner.backward(whole_dout, part, targets=(into_q, into_k, into_v))
            returning.append(back.send(slot, group))
        for arrival in returning:
            arrival.wait()
        return dq, dk, dv

    def chunks(self, rank: int, length: int) -> list[slice]:
        """Where the `length` tokens of `rank` stand among the group's, in their local order."""
        half = length // 2
        if rank == self.size - 1:  # its chunks are neighbours
            return [slice(half * rank, half * rank + length)]
        last = 2 * self.size - 1 - rank
        return [slice(half * rank, half * (rank + 1)), slice(half * last, half * (last + 1))]


class _Trade:
    """Tensors [B, L, heads, D] whose heads travel together, one group after the other: each rank's tokens of all heads
    for all tokens of one rank's heads, or back."""

    def __init__(self, attention: UlyssesAttention, tensors: Sequence[Tensor], k: Tensor):
        self.attention, self.transport = attention, attention.transport
        self.batch, self.length, kv_heads, head_dim = k.shape
        assert kv_heads % attention.size == 0, "launch.context_plan trades heads over as many ranks as divide them"
        assert attention.head_groups <= kv_heads // attention.size, "a group has at least one KV head of each rank"
        sizes = group_sizes(kv_heads // attention.size, attention.head_groups)
        repeats = [tensor.shape[2] // kv_heads for tensor in tensors]
        self.groups = [
            [Heads(tensor, (end - size) * times, size * times) for tensor, times in zip(tensors, repeats, strict=True)]
            for size, end in zip(sizes, accumulate(sizes), strict=True)
        ]
        tokens = attention.size * self.length
        self.shapes = [(tokens, self.batch, sum(part.count for part in group), head_dim) for group in self.groups]
        """T, B, w, D of each group."""

    @property
    def numel(self) -> int:
        """Numbers that one rank holds of all groups."""
        return sum(map(math.prod, self.shapes))

    def by_group(self, memory: Tensor) -> list[Tensor]:
        """`memory` [numel] as one tensor [T, B, w, D] for each group."""
        parts = memory.split_with_sizes([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def lse_by_group(self, lse: Tensor) -> list[Tensor]:
        """`lse` [B L H] as one tensor [B, w, T] for each group."""
        parts = lse.split_with_sizes([math.prod(shape[:3]) for shape in self.shapes])
        return [part.view(batch, heads, -1) for part, (_, batch, heads, _) in zip(parts, self.shapes, strict=True)]

    def split(self, whole: Tensor, group: int) -> list[Tensor]:
        """[T, B, w, D] as views [B, T, heads, D] of each tensor's part."""
        return _by_part(whole.transpose(0, 1), self.groups[group])

    def gather(self, wholes: Sequence[Tensor]) -> list[Arrival]:
        """Starts to bring all tokens of this rank's heads to `wholes` [T, B, w, D], by group."""
        size, length, rank = self.attention.size, self.length, self.attention.rank
        own, arrivals = self.attention.chunks(rank, length), []
        for parts, shape, whole in zip(self.groups, self.shapes, wholes, strict=True):
            slot = self.transport.slot(shape, whole)
            pack_heads(parts, slot.unflatten(0, (size, length)), whole, rank, own)

            def place(owner: int, rows: list[Tensor], whole: Tensor = whole) -> None:
                start = 0
                for tokens in self.attention.chunks(owner, length):
                    stop = start + tokens.stop - tokens.start
                    whole[tokens].copy_(rows[0][start:stop])
                    start = stop

            arrivals.append(
                self.transport.exchange(
                    slot, lambda owner, reader: [slice(reader * length, (reader + 1) * length)], place
                )
            )
        return arrivals

    def slot(self, group: int) -> Tensor:
        """[T, B, w, D]: where a group's results are wanted."""
        return self.transport.slot(self.shapes[group], self.groups[group][0].tensor)

    def send(self, slot: Tensor, group: int) -> Arrival:
        """Starts to bring the results in `slot` to the tensors of the ranks whose tokens they are."""
        parts, size, rank = self.groups[group], self.attention.size, self.attention.rank

        def rows(owner: int, reader: int) -> list[slice]:
            return self.attention.chunks(reader, self.length)

        def place(owner: int, chunks: list[Tensor]) -> None:
            targets, start = [part.of(owner, size).transpose(0, 1) for part in parts], 0
            for chunk in chunks:
                stop = start + chunk.shape[0]
                for target, source in zip(targets, _by_part(chunk, parts), strict=True):
                    copy_rows(target[start:stop], source)
                start = stop

        arrival = self.transport.exchange(slot, rows, place)
        unpack_heads(parts, slot, rows(rank, rank), rank, size)
        return arrival


def _by_part(together: Tensor, parts: Sequence[Heads]) -> list[Tensor]:
    """[.., .., w, D] as views of each part's heads."""
    return list(together.split_with_sizes([part.count for part in parts], 2)) if len(parts) > 1 else [together]


def group_sizes(heads: int, groups: int) -> list[int]:
    """Heads of each group: alike, but for a smaller first and last one where there are three or more."""
    if groups < 3:
        ends, inner = [], groups
    else:
        ends, inner = [max(1, heads // (2 * (groups - 1)))], groups - 2
    left = heads - 2 * sum(ends)
    return ends + [left * (i + 1) // inner - left * i // inner for i in range(inner)] + ends
