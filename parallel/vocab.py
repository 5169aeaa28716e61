"""Vocabulary parallelism: embedding and cross entropy over a vocabulary cut into T slices.

Shapes: B batch, S sequence, E hidden_size, V vocabulary, T tensor_parallel_size, N = B x S tokens.

Each rank holds ceil(V / T) rows. Rows past V are padding: they start at zero, are masked out of the softmax, get no
gradient, and are left out of checkpoints, so that a checkpoint reads the same for every T.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from model.kernels.linear_cross_entropy import IGNORED_LABEL, VocabularySlice, linear_cross_entropy


def padded_vocabulary(vocab_size: int, tensor_parallel_size: int) -> int:
    """V rounded up to a multiple of T."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


class VocabParallelEmbedding(nn.Module):
    """Rows [start, start + V / T) of an embedding. Token ids [B, S] -> [B, S, E], zero for tokens of
    other ranks: a partial sum."""

    def __init__(self, dense_weight: Tensor, group: ProcessGroup):
        super().__init__()
        vocab_size, hidden_size = dense_weight.shape
        rows = padded_vocabulary(vocab_size, group.size()) // group.size()
        self.start = rows * dist.get_rank(group)
        self.weight = nn.Parameter(dense_weight.new_empty(rows, hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        local_ids = input_ids - self.start
        elsewhere = (local_ids < 0) | (local_ids >= self.weight.shape[0])
        embedded = functional.embedding(local_ids.masked_fill(elsewhere, 0), self.weight)
        return embedded.masked_fill(elsewhere.unsqueeze(-1), 0)


class VocabParallelHead(nn.Module):
    """The head over a cut vocabulary: `head(hidden, labels) -> (loss_sum, token_count)`; logits are never gathered.

    hidden [B, S, E], labels [B, S] (-100: no loss). Without labels it returns the full logits [B, S, V] (generation).
    The gradient of hidden is a partial sum.
    """

    def __init__(self, dense_weight: Tensor, group: ProcessGroup):
        super().__init__()
        self.vocab_size, hidden_size = dense_weight.shape
        rows = padded_vocabulary(self.vocab_size, group.size()) // group.size()
        self.group, self.start = group, rows * dist.get_rank(group)
        self.compiled = False
        self.weight = nn.Parameter(dense_weight.new_empty(rows, hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None:
            local_logits = functional.linear(hidden, self.weight)
            slices = [torch.empty_like(local_logits) for _ in range(self.group.size())]
            dist.all_gather(slices, local_logits.contiguous(), group=self.group)
            return torch.cat(slices, dim=-1)[..., : self.vocab_size]
        loss_sum = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            vocabulary=VocabularySlice(self.start, max(0, self.vocab_size - self.start)),
            combine=lambda statistics: _combined(statistics, self.group),
            compiled=self.compiled,
        )
        return loss_sum, (labels != IGNORED_LABEL).sum()


def _combined(statistics: Tensor, group: ProcessGroup) -> Tensor:
    """The softmax's statistics [3, C] over the whole vocabulary, from those of each rank's slice: in one message what
    Megatron-LM (section 3) sums in three."""
    slices = [torch.empty_like(statistics, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(slices, statistics.contiguous(), group=group)
    maxima, normalisers, targets = torch.stack(slices, dim=1)
    maximum = maxima.amax(dim=0)
    normaliser = (normalisers * (maxima - maximum).exp()).sum(dim=0)
    return torch.stack([maximum, normaliser, targets.sum(dim=0)])
