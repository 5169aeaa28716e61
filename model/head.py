"""The language-model head: hidden states to a summed loss, in one module.

Shapes: B batch, S sequence, E hidden_size, V vocabulary.

Loss and projection live together so that a fused or vocabulary-parallel head replaces this module and nothing else, and
so that ZeRO-3 gathers the weight, tied or not, inside the head's own forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED_LABEL = -100
"""Positions with this label carry no loss (torch's convention)."""


class Head(nn.Module):
    """`head(hidden [B, S, E], labels [B, S]) -> (loss_sum, token_count)`: cross entropy in nats, summed in fp32.

    Without labels it returns the logits [B, S, V].
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, self.weight)
        if labels is None:
            return logits
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        loss_sum = functional.cross_entropy(precise, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        return loss_sum, (labels != IGNORED_LABEL).sum()
