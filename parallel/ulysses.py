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
        arriving = self._gather((q, k, v), inputs)
        leaving = []
        attended = self._by_tokens(outputs, [q])
        for group, (arrival, (whole_q, whole_k, whole_v)) in enumerate(arriving):
            arrival.wait()
            (result,) = attended[group]
            _, part, _ = self.inner.forward(whole_q, whole_k, whole_v, documents, out=result)
            lse[group] = part
            slot = self._slot([q])
            for peer in self._peers:
                for tokens in self._chunks(peer, q):
                    slot[tokens].copy_(result.transpose(0, 1)[tokens])
            leaving.append(self._return(slot, group, [out], own=[result]))
        for arrival in leaving:
            arrival.wait()
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
        gradients = [
            like.new_empty(like.shape) if target is None else target
            for like, target in zip((q, k, v), targets, strict=True)
        ]
        needed = (dout,) if self.keep else (dout, q, k, v, out)
        arriving = self._gather(needed, q.new_empty(sum(tensor.numel() for tensor in needed)))
        if self.keep:
            inputs, outputs = kept.split([q.numel() + 2 * k.numel(), q.numel()])
            known = zip(self._by_tokens(inputs, [q, k, v]), self._by_tokens(outputs, [q]), strict=True)
            saved = [(whole[0], whole[1], whole[2], result[0]) for whole, result in known]
        else:
            saved = [(views[1], views[2], views[3], views[4]) for _, views in arriving]
        leaving = []
        for group, (arrival, (whole_dout, *_)) in enumerate(arriving):
            arrival.wait()
            slot = self._slot([q, k, v])
            parts = _split(slot.transpose(0, 1), [self._heads(like) for like in (q, k, v)])
            whole_q, whole_k, whole_v, whole_out = saved[group]
            targets = parts[0], parts[1], parts[2]
            self.inner.backward(
                whole_dout, whole_q, whole_k, whole_v, whole_out, lse[group], q.new_empty(0), documents, targets
            )
            leaving.append(self._return(slot, group, gradients, own=parts))
        for arrival in leaving:
            arrival.wait()
        return gradients[0], gradients[1], gradients[2]

    # -- trading -------------------------------------------------------------------------------------------------------

    def _gather(self, tensors: Sequence[Tensor], memory: Tensor) -> list[tuple[Arrival, list[Tensor]]]:
        """Starts to collect all tokens of this rank's heads of `tensors` [B, L, heads, D].

        Returns, for each group of heads, its arrival and the views [B, T, heads / U / G, D] of `memory` that it fills.
        """
        batch, length = tensors[0].shape[:2]
        sizes = [self._heads(tensor) for tensor in tensors]
        shape = self.size * length, batch, sum(sizes), tensors[0].shape[3]
        gathered = []
        for group, whole in enumerate(memory.view(self.head_groups, *shape)):
            slot = self.transport.slot(shape, tensors[0])
            for peer in self._peers:
                _pack(slot[peer * length : (peer + 1) * length], tensors, sizes, self._head_starts(peer, group, sizes))

            def place(peer: int, rows: list[Tensor], whole: Tensor = whole) -> None:
                start = 0
                for tokens in self._chunks(peer, tensors[0]):
                    count = tokens.stop - tokens.start
                    whole[tokens].copy_(rows[0][start : start + count])
                    start += count

            arrival = self.transport.exchange(
                slot, lambda owner, reader: [slice(reader * length, (reader + 1) * length)], place
            )
            start = 0
            for tokens in self._chunks(self.rank, tensors[0]):
                count = tokens.stop - tokens.start
                local = [tensor[:, start : start + count] for tensor in tensors]
                _pack(whole[tokens], local, sizes, self._head_starts(self.rank, group, sizes))
                start += count
            gathered.append((arrival, _split(whole.transpose(0, 1), sizes)))
        return gathered

    def _slot(self, likes: Sequence[Tensor]) -> Tensor:
        """A slot [T, B, heads, D] for results of all of the group's tokens."""
        batch, length, _, head_dim = likes[0].shape
        heads = sum(self._heads(like) for like in likes)
        return self.transport.slot((self.size * length, batch, heads, head_dim), likes[0])

    def _return(self, slot: Tensor, group: int, targets: list[Tensor], own: Sequence[Tensor]) -> Arrival:
        """Starts to bring results in `slot` back to the ranks of their tokens; `own` are this rank's, [B, T, ., D]."""
        sizes = [self._heads(target) for target in targets]

        def scatter(owner: int, tokens: int, parts: Sequence[Tensor]) -> None:
            for target, part, size in zip(targets, parts, sizes, strict=True):
                (start,) = self._head_starts(owner, group, [size])
                copy_wide(target[:, tokens : tokens + part.shape[1], start : start + size], part)

        def place(owner: int, rows: list[Tensor]) -> None:
            tokens = 0
            for part in rows:
                scatter(owner, tokens, _split(part.transpose(0, 1), sizes))
                tokens += part.shape[0]

        arrival = self.transport.exchange(slot, lambda owner, reader: self._chunks(reader, targets[0]), place)
        tokens = 0
        for chunk in self._chunks(self.rank, targets[0]):
            scatter(self.rank, tokens, [tensor[:, chunk] for tensor in own])
            tokens += chunk.stop - chunk.start
        return arrival

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

    def _heads(self, like: Tensor) -> int:
        """Heads of one group of one rank."""
        return like.shape[2] // self.size // self.head_groups

    def _head_starts(self, rank: int, group: int, sizes: Sequence[int]) -> list[int]:
        return [(rank * self.head_groups + group) * size for size in sizes]

    def _by_tokens(self, memory: Tensor, likes: Sequence[Tensor]) -> list[list[Tensor]]:
        """`memory` as [G, T, B, heads, D]: for each group the views [B, T, heads / U / G, D] of each tensor."""
        batch, length, _, head_dim = likes[0].shape
        sizes = [self._heads(like) for like in likes]
        groups = memory.view(self.head_groups, self.size * length, batch, sum(sizes), head_dim)
        return [_split(group.transpose(0, 1), sizes) for group in groups]


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


def _pack(target: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], starts: Sequence[int]) -> None:
    """target [tokens, B, sum of sizes, D] takes heads [start, start + size) of each tensor [B, tokens, heads, D]."""
    for part, tensor, size, start in zip(_split(target, sizes), tensors, sizes, starts, strict=True):
        copy_wide(part, tensor[:, :, start : start + size].transpose(0, 1))


def _split(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of consecutive heads (dim 2)."""
    return list(tensor.split(list(sizes), dim=2))
