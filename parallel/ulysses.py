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
from model.kernels.operator import NO_TARGETS
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
        memory = kept if self.keep else q.new_empty(2 * q.numel() + 2 * k.numel())
        inputs, outputs = memory.split([q.numel() + 2 * k.numel(), q.numel()])
        trade = _Trade(self, [out])
        arriving = _Gathering(self, [q, k, v], inputs)
        for group, whole in enumerate(self._by_tokens(outputs, [q])):
            whole_q, whole_k, whole_v = arriving.wait(group)
            result = whole.transpose(0, 1)
            _, part, _ = self.inner.forward(whole_q, whole_k, whole_v, documents, out=result)
            lse[group] = part
            slot = trade.slot()
            for peer in self._peers:
                for tokens in self._chunks(peer, q):
                    slot[tokens].copy_(whole[tokens])
            trade.send(slot, whole)
        trade.finish()
        return out, lse, kept

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        kept: Tensor,
        documents: Documents | None,
        targets: Targets = NO_TARGETS,
    ) -> Gradients:
        dq, dk, dv = (
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        )
        needed = [dout] if self.keep else [dout, q, k, v, out]
        arriving = _Gathering(self, needed, q.new_empty(sum(tensor.numel() for tensor in needed)))
        inputs, outputs = kept.split([q.numel() + 2 * k.numel(), q.numel()] if self.keep else [0, 0])
        trade = _Trade(self, [dq, dk, dv])
        for group in range(self.head_groups):
            whole_dout, *saved = arriving.wait(group)
            if self.keep:
                of_inputs, of_outputs = self._by_tokens(inputs, [q, k, v])[group], self._by_tokens(outputs, [q])[group]
                saved = [*_split(of_inputs, [q, k, v], self), of_outputs.transpose(0, 1)]
            slot = trade.slot()
            into = _split(slot, [q, k, v], self)
            whole_q, whole_k, whole_v, whole_out = saved
            self.inner.backward(
                whole_dout,
                whole_q,
                whole_k,
                whole_v,
                whole_out,
                lse[group],
                q.new_empty(0),
                documents,
                targets=(into[0], into[1], into[2]),
            )
            trade.send(slot, slot)
        trade.finish()
        return dq, dk, dv

    # -- who has what --------------------------------------------------------------------------------------------------

    @property
    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _chunks(self, rank: int, like: Tensor) -> list[slice]:
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

    def of_group(self, tensor: Tensor, group: int) -> Tensor:
        """[B, L, heads, D] as [U, L, B, heads / U / G, D]: for each rank of the group its heads of one group."""
        return tensor.unflatten(2, (self.size, self.head_groups, self.heads(tensor)))[:, :, :, group].permute(
            2, 1, 0, 3, 4
        )

    def _by_tokens(self, memory: Tensor, likes: Sequence[Tensor]) -> Tensor:
        """`memory` as [G, T, B, heads, D] with the heads of one rank and group of all of `likes` [B, L, ., D]."""
        batch, length, _, head_dim = likes[0].shape
        heads = sum(self.heads(like) for like in likes)
        return memory.view(self.head_groups, self.size * length, batch, heads, head_dim)


class _Gathering:
    """All tokens of this rank's heads of some tensors [B, L, heads, D], one group of heads after the other."""

    _AHEAD = 2
    """Groups on their way at a time: the one that is waited for and the next."""

    def __init__(self, attention: UlyssesAttention, tensors: Sequence[Tensor], memory: Tensor):
        """`memory` receives them: `UlyssesAttention._by_tokens`."""
        self.attention, self.tensors = attention, tensors
        self.whole = attention._by_tokens(memory, tensors)
        self.arrivals = [self._start(group) for group in range(min(self._AHEAD, attention.head_groups))]

    def wait(self, group: int) -> list[Tensor]:
        """The tensors [B, T, heads / U / G, D]."""
        self.arrivals[group].wait()
        following = len(self.arrivals)
        if group and following < self.attention.head_groups:
            self.arrivals.append(self._start(following))
        return _split(self.whole[group], self.tensors, self.attention)

    def _start(self, group: int) -> Arrival:
        attention, whole, length = self.attention, self.whole[group], self.tensors[0].shape[1]
        slot = attention.transport.slot(whole.shape, whole)
        by_rank = slot.unflatten(0, (attention.size, length))
        start = 0
        for tensor in self.tensors:
            heads = attention.heads(tensor)
            copy_wide(by_rank[:, :, :, start : start + heads], attention.of_group(tensor, group))
            start += heads

        def place(owner: int, rows: list[Tensor]) -> None:
            chunks = attention._chunks(owner, self.tensors[0])
            for tokens, part in zip(chunks, rows[0].split([t.stop - t.start for t in chunks]), strict=True):
                whole[tokens].copy_(part)

        arrival = attention.transport.exchange(
            slot, lambda owner, reader: [slice(reader * length, (reader + 1) * length)], place
        )
        place(attention.rank, [by_rank[attention.rank]])
        return arrival


class _Trade:
    """Results for all tokens of this rank's heads, on their way to the ranks of their tokens."""

    def __init__(self, attention: UlyssesAttention, targets: Sequence[Tensor]):
        """`targets` [B, L, heads, D] receive this rank's tokens of all heads."""
        self.attention, self.targets = attention, targets
        self.length = targets[0].shape[1]
        self.under_way: list[tuple[Arrival, Tensor]] = []
        self.done = 0

    def slot(self) -> Tensor:
        """[T, B, heads, D]: the results of one group of heads, for peers to take."""
        batch, _, _, head_dim = self.targets[0].shape
        heads = sum(self.attention.heads(target) for target in self.targets)
        like = self.targets[0]
        return self.attention.transport.slot((self.attention.size * self.length, batch, heads, head_dim), like)

    def send(self, slot: Tensor, own: Tensor) -> None:
        """Starts to bring a group's results home, and settles the group before; `own` [T, B, heads, D] has this rank's."""
        attention = self.attention
        landing = slot.new_empty((attention.size, self.length, *slot.shape[1:]))

        def place(owner: int, rows: list[Tensor]) -> None:
            tokens = 0
            for part in rows:
                landing[owner, tokens : tokens + part.shape[0]].copy_(part)
                tokens += part.shape[0]

        def rows(owner: int, reader: int) -> list[slice]:
            return attention._chunks(reader, self.targets[0])

        self.under_way.append((attention.transport.exchange(slot, rows, place), landing))
        place(attention.rank, [own[tokens] for tokens in rows(attention.rank, attention.rank)])
        if len(self.under_way) > 1:
            self._settle()

    def finish(self) -> None:
        """Afterwards all targets are complete."""
        while self.done < len(self.under_way):
            self._settle()

    def _settle(self) -> None:
        arrival, landing = self.under_way[self.done]
        arrival.wait()
        start = 0
        for target in self.targets:
            heads = self.attention.heads(target)
            copy_wide(self.attention.of_group(target, self.done), landing[:, :, :, start : start + heads])
            start += heads
        self.done += 1


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


def _split(whole: Tensor, likes: Sequence[Tensor], attention: UlyssesAttention) -> list[Tensor]:
    """[T, B, heads, D] as views [B, T, ., D] of the heads of each of `likes`."""
    return list(whole.transpose(0, 1).split([attention.heads(like) for like in likes], dim=2))
