"""What replaces DeepSpeed's methods at stage 2 and 3 alike: the norm of the gradients and their clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def replace(owner: Any, name: str, method: Any) -> None:
    """Sets a method that DeepSpeed must have."""
    assert hasattr(owner, name), f"DeepSpeed names {name} otherwise now"
    setattr(owner, name, method)


def grad_norm(optimizer: Any, gradients: Sequence[Tensor], parameters: Sequence[Any], norm_type: int = 2) -> Tensor:
    """2-norm over dp x cp and tp by one pass, in fp64; -1 if it is not finite. DeepSpeed copies them to fp64 first.

    `gradients` without padding, or that alone where this rank keeps a part of no parameter.
    """
    assert norm_type == 2
    norms = torch._foreach_norm(list(gradients))
    of_first_rank = [  # of tp: its gradients of what is not split are the same, and it counts them
        norm
        for norm, parameter in zip(norms, parameters, strict=bool(parameters))
        if optimizer.model_parallel_rank > 0 and not getattr(parameter, "tensor_model_parallel", False)
    ]
    if of_first_rank:
        torch._foreach_mul_(of_first_rank, 0.0)  # unless one is not finite here: then no rank may update
    square = torch.stack(norms).double().square().sum()
    dist.all_reduce(square, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=square, op=dist.ReduceOp.SUM)
    return torch.where(square.isfinite(), square.sqrt(), -1.0)


def clip_in_update(optimizer: Any, _gradients: Any, scaled_norm: Tensor) -> None:
    """Lets the fused AdamW, which divides by `grad_scale`, clip the gradients as it reads them.

    DeepSpeed multiplies all of them by the clipping factor first.
    """
    # Filled on the device: a number copied there would let the host wait.
    scale = torch.full((), float(optimizer.loss_scale), device=scaled_norm.device)
    if optimizer.clip_grad > 0:
        excess = (scaled_norm / optimizer.loss_scale + 1e-6) / optimizer.clip_grad
        scale = (scale * excess.clamp(min=1.0)).float()
    optimizer.optimizer.grad_scale = scale
