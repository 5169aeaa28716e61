"""What a block recomputes in the backward pass instead of keeping it: policies of activation checkpointing.

| policy      | kept of a block                                   | computed again                               |
|-------------|---------------------------------------------------|----------------------------------------------|
| `none`      | all that gradients need                           | nothing                                      |
| `selective` | its input, matrix products, attention's results   | what is cheap: norms, rotation, activation   |
| `attention` | its input, attention's results                    | the rest: attention, with its messages, never |
| `full`      | its input                                         | everything                                   |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.kernels.operator import attention_op

Recompute = Literal["none", "selective", "attention", "full"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default)


class Store(Protocol):
    """Where a block leaves what it keeps for the backward pass."""

    def block(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Around the forward pass of one block on the input `hidden`: what autograd saves in it is packed."""

    def pack(self, tensor: Tensor) -> Any: ...

    def unpack(self, packed: Any) -> Tensor: ...


def recomputed(function: Callable[..., Any], policy: Recompute, store: Store | None = None) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps what `policy` says (torch.utils.checkpoint), in `store`."""
    if policy == "none":
        return function
    if policy == "full":
        return partial(checkpoint, function, use_reentrant=False)
    if policy == "attention" and not torch.compiler.is_compiling() and store is not None:
        # What a selective checkpoint keeps is not seen by autograd, nor by a store, unless it is compiled.
        return partial(checkpoint, function, use_reentrant=False, context_fn=partial(_attention_in, store))
    kept = (attention_op, *_PRODUCTS) if policy == "selective" else (attention_op,)
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep, kept))
    return partial(checkpoint, function, use_reentrant=False, context_fn=contexts)


def _keep(kept: tuple[Any, ...], _context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _attention_in(store: Store) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of a forward pass and of its recomputation: what attention gives in the one is there in the other."""
    packed: list[Any] = []
    return _Attend(store, packed), _Recall(store, packed)


class _Attend(TorchDispatchMode):
    """Packs the results of the one attention in a block."""

    def __init__(self, store: Store, packed: list[Any]):
        super().__init__()
        self.store, self.packed = store, packed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if function is attention_op:
            assert not self.packed, "a block attends once"
            self.packed += [self.store.pack(result.detach()) for result in results]
        return results


class _Recall(_Attend):
    """Gives them back where they would be computed again."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is attention_op:
            return tuple(self.store.unpack(packed).detach() for packed in self.packed)
        return function(*args, **(kwargs or {}))
