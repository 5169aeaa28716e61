"""The language-model head: hidden states to a summed loss, in one module.

Shapes: B batch, S sequence, E hidden_size, V vocabulary.

Loss and projection are in the same module for three reasons: the loss can be computed in chunks, a vocabulary-parallel
head replaces this module and nothing else, and ZeRO-3 gathers the weight, tied or not, inside the head's own forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.kernels.linear_cross_entropy import IGNORED_LABEL, linear_cross_entropy


class Head(nn.Module):
    """`head(hidden [B, S, E], labels [B, S]) -> (loss_sum, token_count)`: cross entropy in nats, summed in fp32.

    Without labels it returns the logits [B, S, V]; with them these never exist whole.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.compiled = False

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if labels is None:
            return functional.linear(hidden, self.weight)
        tokens = hidden.flatten(0, 1)
        loss_sum = linear_cross_entropy(tokens, self.weight, labels.flatten(), compiled=self.compiled)
        return loss_sum, (labels != IGNORED_LABEL).sum()
