"""Tensor parallelism: a plan of plain data applied to a model on the meta device (Megatron-LM, arXiv:1909.08053).

Shapes: B batch, S sequence, I input features, O output features, T tensor_parallel_size.

The plan maps module-name patterns to the styles below. Nothing else of the model is known here. Parameter names do not
change, so a checkpoint reads the same for every T.

| style           | weight on this rank      | what it does                                            |
|-----------------|--------------------------|---------------------------------------------------------|
| region_input    | replicated               | its output enters a region                              |
| column          | [O / T, I], bias [O / T] | in a region: whole inputs to this rank's features       |
| row             | [O, I / T], bias whole   | in a region: this rank's features to a partial sum      |
| partial_grad    | replicated               | in a region: acts on this rank's heads only             |
| region_output   | replicated               | its output, a partial sum, leaves a region              |
| vocab_embedding | [V / T, I]               | its output, a partial sum, leaves a region              |
| vocab_head      | [V / T, I]               | in a region: cross entropy (`parallel.vocab`)           |
| replicated      | replicated               | nothing                                                 |

A region is what the ranks compute in parts. Layers do not communicate, its ends do (`Region`): whole hidden states
enter, partial sums leave. With sequence parallelism (arXiv:2205.05198) each rank holds S / T tokens of the hidden
states between two regions.
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

from parallel.collectives import all_reduced, copy_to_group, gather_sequence, reduce_from_group, scatter_sequence
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
    """The whole parameter is here, but acts on this rank's heads or tokens only: its gradient is one term of a sum."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """First index of the rectangle in each dim."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.full_shape)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent of the rectangle in each dim, padding left out."""
        return tuple(self.length if dim == self.dim else size for dim, size in enumerate(self.full_shape))


@dataclass(frozen=True)
class Region:
    """The two ends of what a group computes in parts; each is the other's backward."""

    group: ProcessGroup
    sequence_parallel: bool
    """Outside, each rank holds S / T tokens; otherwise all hold all."""

    def enter(self, hidden: Tensor) -> Tensor:
        """[B, S, E] or this rank's [B, S / T, E] -> [B, S, E], of which each rank uses what it needs."""
        return (gather_sequence if self.sequence_parallel else copy_to_group)(hidden, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """Each rank's partial sum [B, S, E] -> the sum, or this rank's [B, S / T, E] of it."""
        return (scatter_sequence if self.sequence_parallel else reduce_from_group)(partial, self.group)


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
    """Y_r = X_r W_r^T with W cut by input features, a term of Y = sum_r Y_r + b. [B, S, I / T] -> [B, S, O].

    Every rank holds the whole bias, the first one adds it: the sum has it once, and so has the sum of its gradients.
    """

    def __init__(self, dense: nn.Linear, group: ProcessGroup):
        super().__init__()
        assert dense.in_features % group.size() == 0, dense
        self.bias_share = 1.0 if dist.get_rank(group) == 0 else 0.0
        self.weight = nn.Parameter(dense.weight.new_empty(dense.out_features, dense.in_features // group.size()))
        self.bias = None if dense.bias is None else nn.Parameter(torch.empty_like(dense.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.bias_share
        return functional.linear(hidden, self.weight, bias)


def style_of(name: str, plan: Mapping[str, str]) -> str:
    """The plan's style for one module name; "replicated" where no pattern matches."""
    return next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), "replicated")


def apply_tensor_parallel(
    model: nn.Module, plan: Mapping[str, str], group: ProcessGroup, *, sequence_parallel: bool = False
) -> dict[str, TensorShard]:
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
    rank, shared, region = dist.get_rank(group), _shared_weights(model), Region(group, sequence_parallel)
    partial: set[str] = set()
    for name, module in modules.items():
        style = style_of(name, plan)
        own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if style in _CUT_DIMS:
            module = _parallel_twin(module, style, group)
            model.set_submodule(name, module)
            weight, bias = f"{name}.weight", f"{name}.bias"
            if weight in shards:  # a tied head's weight goes by the embedding's name
                shards[weight] = _shard(shards[weight].full_shape, _CUT_DIMS[style], rank, group.size())
            if bias in shards and style == "column":
                shards[bias] = _shard(shards[bias].full_shape, 0, rank, group.size())
            elif bias in shards:
                partial.add(bias)
        elif style == "partial_grad" or (style == "region_input" and sequence_parallel):
            partial.update(own)
        elif style not in ("region_input", "region_output", "replicated"):
            raise ValueError(f"unknown tensor-parallel style {style!r}")
        if style == "region_input":
            module.register_forward_hook(lambda _module, _inputs, output: region.enter(output))
        elif style in ("region_output", "vocab_embedding"):
            module.register_forward_hook(lambda _module, _inputs, output: region.leave(output))
    for name in partial:
        shards[name] = replace(shards[name], partial_gradient=True)
    for first, other in shared:  # a weight used by two modules stays one parameter
        model.get_submodule(other).weight = model.get_submodule(first).weight
    return shards


_CUT_DIMS = {"column": 0, "row": 1, "vocab_embedding": 0, "vocab_head": 0}
"""The dim of the weight that a style cuts."""


def _parallel_twin(module: nn.Module, style: str, group: ProcessGroup) -> nn.Module:
    """The parallel module that replaces `module`."""
    if style == "vocab_head":
        assert isinstance(module.weight, Tensor)
        return VocabParallelHead(module.weight, group)
    if style == "vocab_embedding":
        assert isinstance(module, nn.Embedding)
        return VocabParallelEmbedding(module.weight, group)
    assert isinstance(module, nn.Linear)
    return (ColumnParallelLinear if style == "column" else RowParallelLinear)(module, group)


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
