"""Finds each parameter's fp32 weight and AdamW moments inside DeepSpeed, at each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import ParallelMesh

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two states of each parameter, by torch's names."""


@dataclass(frozen=True)
class StateFragment:
    """This rank's part of one parameter's training state: `numel` elements from `start` of the flattened local tensor.

    `tensors` holds the fp32 weight ("parameter") and AdamW's moments, flat; writing into them and calling
    `ZeroEngine.adopt_state` changes the model.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["parameter"].numel()


@dataclass(frozen=True)
class Snapshot:
    """This rank's training state at one moment."""

    fragments: list[StateFragment]
    step_count: int
    loss_scaler: dict[str, float]
    wait: Callable[[], None]
    """Returns when the fragments may be read; any thread may call it."""


class ZeroState:
    """The state of a model that DeepSpeed's optimizer shards over dp x cp at one stage, around torch's AdamW."""

    def __init__(self, model: nn.Module, mesh: ParallelMesh, stage: int, sharded: Any, adamw: torch.optim.Optimizer):
        """`sharded` is DeepSpeed's optimizer. Makes the moments, which AdamW would make at its first step: memory is
        known then, and a checkpoint can be loaded."""
        self._model, self._mesh, self._stage, self._sharded, self._adamw = model, mesh, stage, sharded, adamw
        self._create_moments()

    def fragments(self) -> Iterator[StateFragment]:
        """This rank's share, each element of the local model on exactly one rank of dp x cp."""
        for name, parameter in self._model.named_parameters():
            fragment = self._fragment(name, parameter)
            if fragment is not None:
                yield fragment

    def adopt(self, step_count: int) -> None:
        """Takes what was written into the tensors of `fragments()` as the state after `step_count` updates."""
        for state in self._base_optimizer_state():
            state["step"].fill_(step_count)
        self._refresh_working_copies()

    @property
    def step_count(self) -> int:
        """Updates AdamW has made."""
        return int(next(iter(self._base_optimizer_state()))["step"].item())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _create_moments(self) -> None:
        for master in self._flat_masters():
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }
        link = getattr(self._sharded, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2 map parameters to the flat moments
            link()

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that AdamW really updates."""
        optimizer = self._sharded
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(optimizer, attribute):
                return list(getattr(optimizer, attribute))
        return [parameter for group in self._adamw.param_groups for parameter in group["params"]]

    def _base_optimizer_state(self) -> list[dict[str, Tensor]]:
        return [self._adamw.state[master] for master in self._flat_masters()]

    def _fragment(self, name: str, parameter: nn.Parameter) -> StateFragment | None:
        if self._stage == 0:
            if self._mesh.zero_rank != 0:
                return None  # all ranks of dp x cp hold the same; one speaks for them
            state = self._adamw.state[parameter]
            tensors = {"parameter": parameter.data, **{moment: state[moment] for moment in MOMENTS}}
            return StateFragment(name, 0, {key: tensor.view(-1) for key, tensor in tensors.items()})
        if self._stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            tensors = {"parameter": mapping.get_hp_fragment()}
            tensors |= {moment: mapping.get_hp_fragment(moment) for moment in MOMENTS}
            return StateFragment(name, mapping.lp_fragment_address.start, tensors)
        partition = self._stage3_partition(parameter)
        start = self._mesh.zero_rank * partition.numel()
        numel = min(partition.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
        if numel <= 0:
            return None  # only padding here
        tensors = {"parameter": partition}
        tensors |= {moment: self._stage3_partition(parameter, moment) for moment in MOMENTS}
        return StateFragment(name, start, {key: tensor[:numel] for key, tensor in tensors.items()})

    def _stage3_partition(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """A view of this rank's part where it lives; DeepSpeed's public function copies offloaded state to the GPU."""
        partition, _ = self._sharded._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=moment
        )
        return partition

    def _refresh_working_copies(self) -> None:
        """Makes the parameters that compute equal to the fp32 state."""
        optimizer = self._sharded
        if self._stage == 0:
            for parameter in self._model.parameters():  # rank 0 of dp x cp was written; its peers follow
                for tensor in (
                    parameter.data,
                    *(self._adamw.state[parameter][moment] for moment in MOMENTS),
                ):
                    dist.broadcast(tensor, dist.get_global_rank(self._mesh.zero_group, 0), group=self._mesh.zero_group)
        elif self._stage < 3:
            optimizer.update_lp_params()
        else:
            persistent = optimizer.persistent_parameters  # gathered for good; re-gather them from what was written
            if persistent:
                persistent[0].partition(persistent)
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if persistent:
                persistent[0].all_gather(persistent)
            optimizer.invalidate_secondary_tensor()
