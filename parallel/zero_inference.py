"""A model for inference over dp x cp: parameters in the type they compute in, no gradients, no optimizer.

At stage 3 each rank keeps its share of every parameter and gathers a unit at a time (DeepSpeed's ZeRO-Inference,
arXiv:2207.00032). Below stage 3 each rank holds its whole tensor-parallel slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import nn

from parallel.mesh import ParallelMesh
from parallel.tensor import TensorShard
from parallel.zero_config import ModelParallelUnit, ModelSizes, ZeroSettings, deepspeed_config
from parallel.zero_state import StateFragment


class InferenceEngine:
    """A model whose parameters were partitioned by `parallel.zero.partitioner`, without what training adds to it."""

    def __init__(
        self,
        model: nn.Module,
        shards: Mapping[str, TensorShard],
        mesh: ParallelMesh,
        settings: ZeroSettings,
        units: Sequence[nn.Module] = (),
    ):
        """`units`: modules whose parameters stage 3 gathers and releases together, in one message each."""
        self.model, self.shards, self.mesh = model.requires_grad_(False).eval(), shards, mesh
        self._partitioned = settings.stage == 3
        self._forward: Any = model
        if self._partitioned:
            for unit in units:
                set_z3_leaf_module(unit, True)
            self._forward, *_ = deepspeed.initialize(
                model=model,
                mpu=ModelParallelUnit(mesh),
                config=deepspeed_config(settings, ModelSizes.of(model, units)),
                dist_init_required=False,
            )
            self._forward.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self._forward(*args, **kwargs)

    def fragments(self) -> Iterator[StateFragment]:
        """What this rank has to be given before `adopt_state`: each element of the local model is given to one rank of
        dp x cp. Below stage 3 these are whole parameters, dealt out in turn."""
        rank, size = self.mesh.zero_rank, self.mesh.zero_size
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            if self._partitioned:
                part = parameter.ds_tensor  # type: ignore[attr-defined]
                start = rank * part.numel()
                held = min(part.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
                if held > 0:  # else only padding
                    yield StateFragment(name, start, {"parameter": part[:held]})
            elif number % size == rank:
                yield StateFragment(name, 0, {"parameter": parameter.data.view(-1)})

    def adopt_state(self) -> None:
        """Takes what was written into the tensors of `fragments()` as the model's parameters. Collective."""
        if self._partitioned:
            return  # each rank keeps its own; nothing is gathered before the first forward
        group, size = self.mesh.zero_group, self.mesh.zero_size
        for number, parameter in enumerate(self.model.parameters()):
            dist.broadcast(parameter.data, dist.get_global_rank(group, number % size), group=group)
