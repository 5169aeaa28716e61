"""Vocabulary parallelism: embedding and cross entropy over a vocabulary cut into T slices.

Shapes: B batch, S sequence, E hidden_size, V vocabulary, T tensor_parallel_size, N = B x S tokens.

Each rank holds ceil(V / T) rows. Rows past V are padding: they start at zero, are masked out of the softmax, get no
gradient, and are left out of checkpoints, so that a checkpoint reads the same for every T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from parallel.collectives import copy_to_group, reduce_from_group


def padded_vocabulary(vocab_size: int, tensor_parallel_size: int) -> int:
    """V rounded up to a multiple of T."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


class VocabParallelEmbedding(nn.Module):
    """Rows [start, start + V / T) of an embedding. Token ids [B, S] -> [B, S, E], summed over the group."""

    def __init__(self, dense_weight: Tensor, group: ProcessGroup):
        super().__init__()
        vocab_size, hidden_size = dense_weight.shape
        rows = padded_vocabulary(vocab_size, group.size()) // group.size()
        self.group, self.start = group, rows * dist.get_rank(group)
        self.weight = nn.Parameter(dense_weight.new_empty(rows, hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        local_ids = input_ids - self.start
        elsewhere = (local_ids < 0) | (local_ids >= self.weight.shape[0])
        embedded = functional.embedding(local_ids.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_group(embedded.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)


class VocabParallelHead(nn.Module):
    """The head over a cut vocabulary: `head(hidden, labels) -> (loss_sum, token_count)`; logits are never gathered.

    hidden [B, S, E], labels [B, S] (-100: no loss). Without labels it returns the full logits [B, S, V] (generation).
    """

    def __init__(self, dense_weight: Tensor, group: ProcessGroup):
        super().__init__()
        self.vocab_size, hidden_size = dense_weight.shape
        rows = padded_vocabulary(self.vocab_size, group.size()) // group.size()
        self.group, self.start = group, rows * dist.get_rank(group)
        self.weight = nn.Parameter(dense_weight.new_empty(rows, hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        local_logits = functional.linear(copy_to_group(hidden, self.group), self.weight)
        if labels is None:
            slices = [torch.empty_like(local_logits) for _ in range(self.group.size())]
            dist.all_gather(slices, local_logits.contiguous(), group=self.group)
            return torch.cat(slices, dim=-1)[..., : self.vocab_size]
        losses = vocab_parallel_cross_entropy(
            local_logits.flatten(0, 1), labels.flatten(), self.start, self.vocab_size, self.group
        )
        return losses.sum(), (labels != -100).sum()


def vocab_parallel_cross_entropy(
    local_logits: Tensor, labels: Tensor, start: int, vocab_size: int, group: ProcessGroup
) -> Tensor:
    """Per-token cross entropy (nats, fp32; 0 where the label is -100) from this rank's logits [N, V / T].

    Columns start, start + 1, ... of the vocabulary; those at vocab_size and above are padding. Megatron-LM, section 3.
    """
    return _VocabParallelCrossEntropy.apply(local_logits, labels, start, vocab_size, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local_logits: Tensor, labels: Tensor, start: int, vocab_size: int, group: ProcessGroup
    ) -> Tensor:
        logits = local_logits.to(torch.promote_types(local_logits.dtype, torch.float32), copy=True)
        columns = logits.shape[1]
        logits[:, max(0, vocab_size - start) :] = -torch.inf
        maximum = logits.amax(dim=1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        logits -= maximum.unsqueeze(1)

        local_labels = labels - start
        here = (local_labels >= 0) & (local_labels < columns) & (labels != -100)
        safe_labels = torch.where(here, local_labels, 0)
        target = logits.gather(1, safe_labels.unsqueeze(1)).squeeze(1).masked_fill(~here, 0)
        probabilities = logits.exp_()
        sums = torch.stack([probabilities.sum(dim=1), target])
        dist.all_reduce(sums, group=group)
        normaliser, target = sums[0], sums[1]

        probabilities /= normaliser.unsqueeze(1)
        ctx.save_for_backward(probabilities, safe_labels, here, labels)
        ctx.input_dtype = local_logits.dtype
        return torch.where(labels != -100, normaliser.log() - target, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, safe_labels, here, labels = ctx.saved_tensors
        # d loss / d logit = softmax - onehot
        grad_logits = probabilities.scatter_add(1, safe_labels.unsqueeze(1), -here.to(probabilities).unsqueeze(1))
        grad_logits *= torch.where(labels != -100, grads[0], 0).unsqueeze(1)
        return grad_logits.to(ctx.input_dtype), None, None, None, None
