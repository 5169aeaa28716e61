"""The two conjugate collectives of tensor parallelism (Megatron-LM, arXiv:1909.08053, section 3: f and g).

Each is the other's backward, so that gradients need no separate synchronisation. A group of one rank costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduced(grads[0], ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_group(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """f: the tensor itself; its gradient is summed over `group`. For inputs that each rank uses in part."""
    return tensor if group.size() == 1 else _CopyToGroup.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """g: the sum over `group`; its gradient passes unchanged. For outputs of which every rank holds a partial sum."""
    return tensor if group.size() == 1 else _ReduceFromGroup.apply(tensor, group)


def all_reduced(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `tensor` over `group`, as a new tensor."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
