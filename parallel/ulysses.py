"""Context-parallel attention by heads (DeepSpeed-Ulysses, arXiv:2309.14509), alone or around another operator.

Shapes: B batch, L local tokens, U group size, T = U x L tokens of the group, H query heads, K key/value heads,
D head_dim, G head groups, h = H / U / G and k = K / U / G heads that one rank attends with at a time.

The ranks of the group trade their parts of all heads for all of the group's tokens of some heads, attend, and trade
back. The inner operator sees its tokens in the order of positions: the whole sequence where the group is all of context
parallelism, so its mask, packed documents and window need nothing more, and its kernel works on one long call, where it
is at its best. Around a ring or an exchange over R groups the tokens are those of one rank in zigzag order of R.

While the inner operator works on one group of heads the others travel: only the first arrival and the last departure
are exposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels import AttentionOperator, Documents
from model.kernels.operator import NO_TARGETS, Saved
from model.kernels.protocol import Gradients, Targets
from parallel.transport import Arrival, Transport


class UlyssesAttention(AttentionOperator):
    """Causal self-attention of tokens spread over the transport's group (zigzag, see `parallel.sequence`).

    `head_groups` (G) must divide K / U. `keep` holds what was gathered for the backward pass; otherwise it is gathered
    again there, which costs messages and saves the memory of q, k, v and out.
    """

    def __init__(self, transport: Transport, inner: AttentionOperator, *, head_groups: int = 1, keep: bool = True):
        super().__init__()
        self.transport, self.inner, self.head_groups, self.keep = transport, inner, head_groups, keep
        self.size, self.rank = transport.group.size(), transport.rank

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        batch, length, heads, head_dim = q.shape
        lse = self.head_groups, batch, heads // self.size // self.head_groups, self.size * length
        return lse, ((2 * q.numel() + 2 * k.numel()) if self.keep else 0,)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty(q.shape) if out is None else out
        (lse_shape, kept_shape), dtype = self.saved_shapes(q, k), torch.promote_types(q.dtype, torch.float32)
        lse, kept = q.new_empty(lse_shape, dtype=dtype), q.new_empty(kept_shape)
        sizes = [q.numel() + 2 * k.numel(), q.numel()]
        inputs, outputs = kept.split(sizes) if self.keep else (q.new_empty(sizes[0]), kept)
        gathering = _Gathering(self, [q, k, v], inputs)
        returning = _Returning(self, [out], keep=self.by_tokens(outputs, [q]) if self.keep else None)
        for group in range(self.head_groups):
            whole_q, whole_k, whole_v = gathering.wait(group)
            slot = returning.slot()
            result = slot[0].transpose(0, 1)
            _, part, _ = self.inner.forward(whole_q, whole_k, whole_v, documents, out=result)
            lse[group] = part
            returning.send(slot)
        returning.wait()
        return out, lse, kept

    def backward(self, dout: Tensor, saved: Saved, targets: Targets = NO_TARGETS) -> Gradients:
        q, k, v, out, lse, kept, documents = saved
        dq, dk, dv = (
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        )
        needed = [dout] if self.keep else [dout, q, k, v, out]
        gathering = _Gathering(self, needed, q.new_empty(sum(tensor.numel() for tensor in needed)))
        returning = _Returning(self, [dq, dk, dv])
        inputs, outputs = kept.split([q.numel() + 2 * k.numel(), q.numel()] if self.keep else [0, 0])
        for group in range(self.head_groups):
            whole_dout, *whole = gathering.wait(group)
            if self.keep:
                whole = self.split(self.by_tokens(inputs, [q, k, v])[group], [q, k, v])
                whole += self.split(self.by_tokens(outputs, [q])[group], [q])
            slot = returning.slot()
            into = self.split(slot[0], [q, k, v])
            part = Saved(*whole, lse[group], q.new_empty(0), documents)
            self.inner.backward(whole_dout, part, targets=(into[0], into[1], into[2]))
            returning.send(slot)
        returning.wait()
        return dq, dk, dv

    # -- who has what --------------------------------------------------------------------------------------------------

    def chunks(self, rank: int, like: Tensor) -> list[slice]:
        """Where the tokens of `rank` stand among the group's, in their local order; `like` is [B, L, ...]."""
        length = like.shape[1]
        half = length // 2
        if rank == self.size - 1:  # its chunks are neighbours
            return [slice(half * rank, half * rank + length)]
        last = 2 * self.size - 1 - rank
        return [slice(half * rank, half * (rank + 1)), slice(half * last, half * (last + 1))]

    def heads(self, like: Tensor) -> int:
        """Heads of one group of one rank."""
        return like.shape[2] // self.size // self.head_groups

    def of_groups(self, tensor: Tensor) -> Tensor:
        """[B, L, heads, D] as [G, U, L, B, heads / U / G, D]: for each group the heads of each rank."""
        return tensor.unflatten(2, (self.size, self.head_groups, self.heads(tensor))).permute(3, 2, 1, 0, 4, 5)

    def by_tokens(self, memory: Tensor, likes: Sequence[Tensor]) -> Tensor:
        """`memory` as [G, T, B, heads, D] with the heads of one rank and group of all of `likes` [B, L, ., D]."""
        return memory.view(self.head_groups, *self.rows_of_group(likes))

    def rows_of_group(self, likes: Sequence[Tensor]) -> tuple[int, int, int, int]:
        """T, B, heads, D: what one rank holds of one group."""
        batch, length, _, head_dim = likes[0].shape
        return self.size * length, batch, sum(self.heads(like) for like in likes), head_dim

    def split(self, whole: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
        """[T, B, heads, D] as views [B, T, ., D] of the heads of each of `likes`."""
        return list(whole.transpose(0, 1).split([self.heads(like) for like in likes], dim=2))


class _Gathering:
    """Collects all tokens of this rank's heads of some tensors [B, L, heads, D], a stage for each group of heads."""

    def __init__(self, attention: UlyssesAttention, tensors: Sequence[Tensor], memory: Tensor):
        """Starts it. `memory` receives them: `UlyssesAttention.by_tokens`."""
        self.attention, self.tensors = attention, tensors
        self.whole = attention.by_tokens(memory, tensors)
        length = tensors[0].shape[1]
        slot = attention.transport.slot(self.whole.shape, memory)
        by_rank = slot.unflatten(1, (attention.size, length))
        start = 0
        for tensor in tensors:
            heads = attention.heads(tensor)
            copy_wide(by_rank[:, :, :, :, start : start + heads], attention.of_groups(tensor))
            start += heads
        self.arrival = attention.transport.exchange(
            slot, lambda owner, reader: [slice(reader * length, (reader + 1) * length)], self._place
        )

    def wait(self, group: int) -> list[Tensor]:
        """The tensors [B, T, heads / U / G, D]."""
        self.arrival.wait(group)
        return self.attention.split(self.whole[group], self.tensors)

    def _place(self, group: int, owner: int, rows: list[Tensor]) -> None:
        chunks = self.attention.chunks(owner, self.tensors[0])
        for tokens, part in zip(chunks, rows[0].split([t.stop - t.start for t in chunks]), strict=True):
            self.whole[group, tokens].copy_(part)


class _Returning:
    """Brings results for all tokens of this rank's heads home to the ranks of their tokens, group by group."""

    def __init__(self, attention: UlyssesAttention, targets: Sequence[Tensor], keep: Tensor | None = None):
        """`targets` [B, L, heads, D] receive this rank's tokens of all heads; `keep` [G, T, B, heads, D] a copy of
        what this rank sends."""
        self.attention, self.targets, self.keep = attention, targets, keep
        self.shape = attention.rows_of_group(targets)
        self.under_way: list[tuple[Arrival, Tensor]] = []
        """With the memory that they arrive in."""

    def slot(self) -> Tensor:
        """[1, T, B, heads, D]: where the next group's results are wanted."""
        return self.attention.transport.slot((1, *self.shape), self.targets[0])

    def send(self, slot: Tensor) -> None:
        """Starts one group on its way."""
        attention, group, length = self.attention, len(self.under_way), self.targets[0].shape[1]
        landing = slot.new_empty((attention.size, length, *self.shape[1:]))

        def place(stage: int, owner: int, rows: list[Tensor]) -> None:
            tokens = 0
            for part in rows:
                landing[owner, tokens : tokens + len(part)].copy_(part)
                tokens += len(part)

        def finish(stage: int) -> None:
            start = 0
            for target in self.targets:
                heads = attention.heads(target)
                copy_wide(attention.of_groups(target)[group], landing[:, :, :, start : start + heads])
                start += heads
            if self.keep is not None:
                self.keep[group].copy_(slot[0])

        arrival = attention.transport.exchange(
            slot, lambda owner, reader: attention.chunks(reader, self.targets[0]), place, finish
        )
        self.under_way.append((arrival, landing))

    def wait(self) -> None:
        """Afterwards all targets are complete."""
        for arrival, _ in self.under_way:
            arrival.wait()
        self.under_way.clear()


def check_ulysses(num_key_value_heads: int, group_size: int) -> None:
    """Raises ValueError unless the KV heads of a rank divide over the group."""
    if num_key_value_heads % group_size:
        raise ValueError(
            f"attention by heads needs num_key_value_heads of a tensor-parallel rank ({num_key_value_heads}) to be "
            f"divisible by its group ({group_size}); choose context_parallel_mode: auto, exchange or ring"
        )


def copy_wide(target: Tensor, source: Tensor) -> None:
    """target.copy_(source) in elements of 16 bytes where strides allow: twice as fast for rows that do not follow."""
    wide = (_wide(target), _wide(source))
    if wide[0] is not None and wide[1] is not None and not (target.is_contiguous() and source.is_contiguous()):
        wide[0].copy_(wide[1])
    else:
        target.copy_(source)


def _wide(tensor: Tensor) -> Tensor | None:
    numbers = 16 // tensor.element_size()
    aligned = tensor.stride(-1) == 1 and all(stride % numbers == 0 for stride in tensor.stride()[:-1])
    if not aligned or tensor.shape[-1] % numbers or tensor.storage_offset() % numbers or not tensor.is_cuda:
        return None
    return tensor.view(torch.complex128)
