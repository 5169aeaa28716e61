"""The conjugate collectives of tensor parallelism (Megatron-LM, arXiv:1909.08053, section 3: f and g) and of its
sequence parallelism (arXiv:2205.05198, section 4.2.2: g and g-bar, here gather and scatter).

Shapes: B batch, S sequence, E hidden_size, T ranks of the group.

In each pair one is the other's backward, so gradients need no separate synchronisation. A group of one rank costs
nothing.

Like DTensor's, they are torch's functional collectives. With torch.distributed's own, a compiled backward pass (torch
2.11) lost what they wrote into a tensor made there, and all gradients before it were zero.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional_collectives


class _CopyToGroup(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduced(grads[0], ctx.group), None


class _ReduceFromGroup(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scattered(grads[0], ctx.group), None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scattered(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gathered(grads[0], ctx.group), None


def copy_to_group(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """f: the tensor itself; its gradient is summed over `group`. For inputs that each rank uses in part."""
    return tensor if group.size() == 1 else _CopyToGroup.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """g: the sum over `group`; its gradient passes unchanged. For outputs of which every rank holds a partial sum."""
    return tensor if group.size() == 1 else _ReduceFromGroup.apply(tensor, group)


def gather_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """f where each rank holds a part of the sequence: [B, S / T, E] -> the whole [B, S, E]; its gradient is summed over
    `group`, each rank keeping its part."""
    return tensor if group.size() == 1 else _GatherSequence.apply(tensor, group)


def scatter_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """g where each rank shall hold a part of the sequence: partial sums [B, S, E] -> this rank's part [B, S / T, E] of
    the sum over `group`; its gradient is gathered."""
    return tensor if group.size() == 1 else _ScatterSequence.apply(tensor, group)


def all_reduced(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `tensor` over `group`, as a new tensor."""
    return _finished(functional_collectives.all_reduce(tensor.contiguous(), "sum", group))


def gathered(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' tensors [B, S / T, E] one after the other along the sequence, [B, S, E]."""
    parts = _finished(functional_collectives.all_gather_tensor(tensor.contiguous(), 0, group))  # [T B, S / T, E]
    return parts.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)  # without a copy where B is 1


def reduce_scattered(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part [B, S / T, E] of the sum of `tensor` [B, S, E] over `group`."""
    parts = tensor.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1)  # without a copy where B is 1
    return _finished(functional_collectives.reduce_scatter_tensor(parts.contiguous(), "sum", 0, group))


def _finished(result: Tensor) -> Tensor:
    """A collective's result, for which the device waits and not the host; in a compiled function it is plain."""
    return result.wait() if isinstance(result, functional_collectives.AsyncCollectiveTensor) else result
