"""Cross entropy of a linear layer's outputs, a chunk of tokens at a time: the logits never exist whole.

Shapes: N tokens, C tokens of a chunk, E hidden_size, V vocabulary (the rows of the weight that are here).

The gradients are computed in the forward pass, while a chunk's logits exist, so they need no second product with the
weight (Liger Kernel, arXiv:2410.10989, section 3.2). The loss is a sum, so its upstream gradient is a single number,
which the backward pass multiplies in. A forward pass leaves behind the gradient of the hidden states [N, E] and that of
the weight [V, E]; the latter accumulates over the chunks in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""Positions with this label carry no loss (torch's convention)."""

_CHUNK_LOGITS = 1 << 28
"""Logits of a chunk: few enough to take 2 GiB with all that is made of them (8 bytes each), and enough for a product
with the weight to take ten times as long as adding the weight's gradient to memory."""

Combine = Callable[[Tensor], Tensor]
"""Joins the statistics [3, C] (see `_statistics`) of several slices of the vocabulary; all slices get the result."""


@dataclass(frozen=True)
class VocabularySlice:
    """Which columns of the logits a weight [V, E] makes: `columns` of them from `start`; its rows beyond are padding,
    which is left out of the softmax and gets no gradient."""

    start: int
    columns: int


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocabulary: VocabularySlice | None = None,
    combine: Combine = lambda statistics: statistics,
    compiled: bool = False,
) -> Tensor:
    """The summed cross entropy (nats, a scalar of fp32 at least) of `hidden @ weight.T` against `labels`.

    hidden [N, E], weight [V, E], labels [N] int64, IGNORED_LABEL where a token carries no loss. Where the weight is a
    slice of a larger vocabulary, `combine` joins the slices' statistics, and the gradient of `hidden` is this slice's
    term of a sum. Under autocast the products are computed in autocast's dtype, and the gradients keep the inputs'.
    `compiled` fuses the softmax between the products (torch.compile), which in plain operators takes two thirds of
    their time (docs/log.md, the trace of ZeRO-3: 205 of 303 ms).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wanted = torch.is_grad_enabled()
    whole = VocabularySlice(0, weight.shape[0])
    loss_sum: Tensor = _LinearCrossEntropy.apply(
        hidden,
        weight,
        labels,
        vocabulary or whole,
        combine,
        _compiled() if compiled else _PLAIN,
        dtype,
        wanted and hidden.requires_grad,
        wanted and weight.requires_grad,
    )
    return loss_sum


def chunk_tokens(vocabulary_size: int) -> int:
    """C for a weight of that many rows: a multiple of 128, at least 128."""
    return max(128, _CHUNK_LOGITS // vocabulary_size // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocabulary: VocabularySlice,
        combine: Combine,
        softmax: _Softmax,
        dtype: torch.dtype,
        hidden_wanted: bool,
        weight_wanted: bool,
    ) -> Tensor:
        precise = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if hidden_wanted else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if weight_wanted else None
        loss_sum = torch.zeros((), dtype=precise, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for rows in _chunks(len(hidden), len(weight)):
                states, targets = hidden[rows].to(dtype), labels[rows]
                logits = states @ matrix.T
                logits[:, vocabulary.columns :] = -torch.inf
                statistics = combine(_statistics(logits, targets, vocabulary.start, softmax))
                maximum, normaliser, target = statistics
                loss_sum += (normaliser.log() + (maximum - target)).masked_fill(targets == IGNORED_LABEL, 0).sum()
                if hidden_wanted or weight_wanted:
                    # from here on their gradient
                    logits = _gradient(logits, targets, vocabulary.start, statistics, softmax)
                if grad_hidden is not None:
                    grad_hidden[rows] = logits @ matrix
                if grad_weight is not None:
                    _add_product(grad_weight, logits.T, states)
                del logits  # the next chunk's would be made beside them
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, upstream, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, upstream, ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _chunks(tokens: int, vocabulary_size: int) -> Iterator[slice]:
    """The fewest chunks that fit, of about equal length."""
    count = max(1, -(-tokens // chunk_tokens(vocabulary_size)))
    length = max(1, -(-tokens // count))
    return (slice(first, first + length) for first in range(0, tokens, length))


def _sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [C, V] and the sum of exp(logit - largest), both [C, 1], in fp32 at least."""
    exponentials = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    # A slice may hold nothing but padding, and exp(-inf - -inf) is not a number.
    maximum = exponentials.amax(dim=1, keepdim=True).clamp(min=torch.finfo(exponentials.dtype).min)
    return maximum, exponentials.sub_(maximum).exp_().sum(dim=1, keepdim=True)


def _probabilities(logits: Tensor, maximum: Tensor, factor: Tensor) -> Tensor:
    """exp(logits - maximum) x factor in the logits' dtype; maximum and factor [C, 1]."""
    return logits.to(maximum.dtype, copy=True).sub_(maximum).exp_().mul_(factor).to(logits.dtype)


class _Softmax(NamedTuple):
    """The passes over a chunk's logits."""

    sums: Callable[[Tensor], tuple[Tensor, Tensor]]
    probabilities: Callable[[Tensor, Tensor, Tensor], Tensor]


_PLAIN = _Softmax(_sums, _probabilities)


@cache
def _compiled() -> _Softmax:
    """Made when first used: torch takes two seconds to import its compiler, as long as all of the rest."""
    return _Softmax(torch.compile(_sums), torch.compile(_probabilities))


def _statistics(logits: Tensor, labels: Tensor, start: int, softmax: _Softmax) -> Tensor:
    """[3, C] of logits [C, V], in fp32 at least: the largest, the sum of exp(logit - largest), and the label's (0 where
    the label is not among these columns)."""
    maximum, normaliser = softmax.sums(logits)
    columns, here = _label_columns(labels, start, logits.shape[1])
    target = logits.gather(1, columns).to(maximum.dtype).masked_fill(~here, 0)
    return torch.cat([maximum, normaliser, target], dim=1).T


def _gradient(logits: Tensor, labels: Tensor, start: int, statistics: Tensor, softmax: _Softmax) -> Tensor:
    """d loss_sum / d logits = softmax - onehot, [C, V]; 0 where the label is ignored."""
    maximum, normaliser, target = statistics.unsqueeze(-1)
    factor = (labels != IGNORED_LABEL).unsqueeze(1) / normaliser
    gradient = softmax.probabilities(logits, maximum, factor)
    columns, here = _label_columns(labels, start, logits.shape[1])
    of_label = ((target - maximum).exp() * factor - 1).to(gradient.dtype)
    return gradient.scatter_(1, columns, torch.where(here, of_label, gradient.gather(1, columns)))


def _label_columns(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each label's column of this slice (0 where it has none) and whether it has one, both [C, 1]."""
    columns = labels.unsqueeze(1) - start
    here = (columns >= 0) & (columns < width) & (labels != IGNORED_LABEL).unsqueeze(1)
    return columns.masked_fill(~here, 0), here


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # torch's CPU product has no wider output: each chunk's is rounded once
        total += left @ right


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor x gradient in `dtype`, without a copy of it in its own."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
