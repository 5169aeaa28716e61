"""What a block computes again in the backward pass instead of keeping it: policies of activation checkpointing.

| policy      | kept of a block                                   | computed again                               |
|-------------|---------------------------------------------------|----------------------------------------------|
| `none`      | all that gradients need                           | nothing                                      |
| `selective` | its input, matrix products, attention's results   | what is cheap: norms, rotation, activation   |
| `attention` | its input, attention's results                    | the rest: attention, with its messages, never |
| `full`      | its input                                         | everything                                   |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.kernels.operator import attention_op

Recompute = Literal["none", "selective", "attention", "full"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default)


def recomputed(function: Callable[..., Any], policy: Recompute) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps what `policy` says (torch.utils.checkpoint)."""
    if policy == "none":
        return function
    if policy == "full":
        return partial(checkpoint, function, use_reentrant=False)
    kept = (attention_op, *_PRODUCTS) if policy == "selective" else (attention_op,)
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep, kept))
    return partial(checkpoint, function, use_reentrant=False, context_fn=contexts)


def _keep(kept: tuple[Any, ...], _context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
