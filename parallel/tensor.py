"""Tensor parallelism: a plan of plain data applied to a model on the meta device (Megatron-LM, arXiv:1909.08053).

Shapes: B batch, S sequence, I input features, O output features, T tensor_parallel_size.

The plan maps module-name patterns to the styles below. Nothing else of the model is known here. Parameter names do not
change, so a checkpoint reads the same for every T.

| style           | weight on this rank      | communication                                              |
|-----------------|--------------------------|------------------------------------------------------------|
| column          | [O / T, I], bias [O / T] | none (its input comes from a region_input)                 |
| row             | [O, I / T], bias whole   | output summed over the group, then the bias added          |
| region_input    | replicated               | gradient of the output summed over the group               |
| partial_grad    | replicated               | acts on this rank's heads only: weight gradient summed     |
| vocab_embedding | [V / T, I]               | output summed over the group                               |
| vocab_head      | [V / T, I]               | cross entropy over the group (`parallel.vocab`)            |
| replicated      | replicated               | none                                                       |
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from parallel.collectives import all_reduced, copy_to_group, reduce_from_group
from parallel.vocab import VocabParallelEmbedding, VocabParallelHead, padded_vocabulary


def check_head_divisibility(num_attention_heads: int, num_key_value_heads: int, tensor_parallel_size: int) -> None:
    """Raises ValueError unless query heads and KV heads both split evenly over the tensor-parallel ranks."""
    if num_attention_heads % tensor_parallel_size or num_key_value_heads % tensor_parallel_size:
        valid = [
            size
            for size in range(1, num_key_value_heads + 1)
            if num_attention_heads % size == 0 and num_key_value_heads % size == 0
        ]
        raise ValueError(
            f"num_attention_heads ({num_attention_heads}) and num_key_value_heads ({num_key_value_heads}) must both be "
            f"divisible by tensor_parallel_size ({tensor_parallel_size}); "
            f"valid sizes here: {', '.join(map(str, valid))}"
        )


@dataclass(frozen=True)
class TensorShard:
    """Which rectangle of a full parameter this rank holds: all of it, or `length` slices from `start` along `dim`.

    The local tensor may be longer than `length` (vocabulary padding); the surplus never leaves the rank.
    """

    full_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    length: int = 0
    partial_gradient: bool = False
    """The whole parameter is here, but acts on this rank's heads only: its gradient is one term of a sum."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """First index of the rectangle in each dim."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.full_shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent of the rectangle in each dim, padding left out."""
        return tuple(self.length if dim == self.dim else size for dim, size in enumerate(self.full_shape))


class ColumnParallelLinear(nn.Module):
    """Y_r = X W_r^T + b_r with W and b cut by output features. [B, S, I] -> [B, S, O / T]."""

    def __init__(self, dense: nn.Linear, group: ProcessGroup):
        super().__init__()
        assert dense.out_features % group.size() == 0, dense
        local_features = dense.out_features // group.size()
        self.weight = nn.Parameter(dense.weight.new_empty(local_features, dense.in_features))
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.new_empty(local_features))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Y = sum_r X_r W_r^T + b with W cut by input features, b whole. [B, S, I / T] -> [B, S, O]."""

    def __init__(self, dense: nn.Linear, group: ProcessGroup):
        super().__init__()
        assert dense.in_features % group.size() == 0, dense
        self.group = group
        self.weight = nn.Parameter(dense.weight.new_empty(dense.out_features, dense.in_features // group.size()))
        self.bias = None if dense.bias is None else nn.Parameter(torch.empty_like(dense.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        total = reduce_from_group(functional.linear(hidden, self.weight), self.group)
        return total if self.bias is None else total + self.bias  # once, after the sum


def style_of(name: str, plan: Mapping[str, str]) -> str:
    """The plan's style for one module name; "replicated" where no pattern matches."""
    return next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), "replicated")


def apply_tensor_parallel(model: nn.Module, plan: Mapping[str, str], group: ProcessGroup) -> dict[str, TensorShard]:
    """Cuts `model` (on the meta device) in place after `plan` and returns each parameter's shard, by parameter name.

    With a group of one nothing changes but the returned map. Raises ValueError for a plan entry that hits no module.
    """
    modules = dict(model.named_modules())
    for pattern in plan:
        if not fnmatch.filter(modules, pattern):
            raise ValueError(f"tensor-parallel plan entry {pattern!r} matches no module of {type(model).__name__}")
    shards = {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    if group.size() == 1:
        return shards
    rank, shared = dist.get_rank(group), _shared_weights(model)
    for name, module in modules.items():
        style = style_of(name, plan)
        if style == "region_input":
            module.register_forward_hook(lambda _module, _inputs, output: copy_to_group(output, group))
        elif style == "partial_grad":
            for key, _ in module.named_parameters():
                shards[f"{name}.{key}"] = replace(shards[f"{name}.{key}"], partial_gradient=True)
        elif style != "replicated":
            parallel, dim = _parallel_twin(module, style, group)
            model.set_submodule(name, parallel)
            weight = f"{name}.weight"
            if weight in shards:  # a tied head's weight goes by the embedding's name
                shards[weight] = _shard(shards[weight].full_shape, dim, rank, group.size())
            bias = f"{name}.bias"
            if bias in shards and style == "column":  # a row layer's bias stays whole
                shards[bias] = _shard(shards[bias].full_shape, 0, rank, group.size())
    for first, other in shared:  # a weight used by two modules stays one parameter
        model.get_submodule(other).weight = model.get_submodule(first).weight
    return shards


def _parallel_twin(module: nn.Module, style: str, group: ProcessGroup) -> tuple[nn.Module, int]:
    """The parallel module that replaces `module`, and the dim of the weight that it cuts."""
    if style == "column":
        assert isinstance(module, nn.Linear)
        return ColumnParallelLinear(module, group), 0
    if style == "row":
        assert isinstance(module, nn.Linear)
        return RowParallelLinear(module, group), 1
    if style == "vocab_embedding":
        assert isinstance(module, nn.Embedding)
        return VocabParallelEmbedding(module.weight, group), 0
    if style == "vocab_head":
        assert isinstance(module.weight, Tensor)
        return VocabParallelHead(module.weight, group), 0
    raise ValueError(f"unknown tensor-parallel style {style!r}")


def _shard(full_shape: tuple[int, ...], dim: int, rank: int, size: int) -> TensorShard:
    """Even cut of `dim` in ceil(n / size) slices; the last ranks hold fewer real slices, or none."""
    per_rank = padded_vocabulary(full_shape[dim], size) // size
    start = min(rank * per_rank, full_shape[dim])
    return TensorShard(full_shape, dim, start, min(per_rank, full_shape[dim] - start))


def _shared_weights(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of module names whose `weight` is one and the same parameter."""
    first: dict[int, str] = {}
    pairs = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            if id(weight) in first:
                pairs.append((first[id(weight)], name))
            first.setdefault(id(weight), name)
    return pairs


def sum_partial_gradients(model: nn.Module, shards: Mapping[str, TensorShard], group: ProcessGroup) -> None:
    """Hooks the parameters marked `partial_gradient`, so that backward adds up their gradients over `group`.

    Call it once the parameters are those that train: hooks do not follow a parameter from the meta device.
    """
    for name, parameter in model.named_parameters():
        if shards[name].partial_gradient:
            parameter.register_hook(lambda gradient: all_reduced(gradient, group))
