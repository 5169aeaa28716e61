"""ZeRO training by DeepSpeed (arXiv:1910.02054) over dp x cp. Only this file and the other `parallel.zero_*` use
DeepSpeed's vocabulary.

Context parallelism is part of what DeepSpeed calls data parallel: all ranks of dp x cp hold the same parameters, and
their gradients are averaged together. So a mean over all tokens comes out right if each rank scales its summed loss by
the size of that group. DeepSpeed's own sequence-parallel hooks are not used, because with them stage 3 never reduces
over cp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__ as _deepspeed_ops
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import groups as _deepspeed_groups
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor, nn

from parallel import zero_stage2, zero_stage3
from parallel.host_copies import HostCopies
from parallel.mesh import ParallelMesh
from parallel.peer_memory import reach_each_other
from parallel.tensor import TensorShard
from parallel.zero_config import ModelParallelUnit, ModelSizes, ZeroSettings, bucket_of_unit, deepspeed_config
from parallel.zero_shares import SharesInReach
from parallel.zero_state import Snapshot, StateFragment, ZeroState

_UNITS_AHEAD = 2
"""Gathered units that may wait in memory for the device to come to them: enough to hide the host's time."""


def initialize_distributed(device_type: str) -> None:
    """Joins the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe: gloo on CPU, NCCL on GPUs."""
    # DeepSpeed would compile a shared-memory collective for CPUs here: half a minute, and 69 MB left in /dev/shm by
    # every process that used it. gloo serves.
    _deepspeed_ops["deepspeed_shm_comm"] = False
    # Its optimizer for bf16 at stage 1 prints the memory in use a dozen times while it is made, wanted or not.
    bf16_optimizer.see_memory_usage = lambda *_args, **_kwargs: None
    deepspeed.init_distributed(dist_backend="nccl" if device_type == "cuda" else "gloo", verbose=False)


def partitioner(mesh: ParallelMesh, settings: ZeroSettings) -> Callable[[nn.Module], None]:
    """A function that keeps only this rank's share of a module's own parameters; below stage 3 it keeps all."""
    if settings.stage < 3:
        return lambda module: None
    config, mpu = deepspeed_config(settings), ModelParallelUnit(mesh)
    # DeepSpeed would make groups of consecutive ranks of the world, which mix the slices of tensor parallelism, and its
    # engine takes what it finds here.
    secondary = mesh.split_zero(settings.secondary_partition_size) if settings.secondary_partition_size > 1 else None
    _deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = secondary

    def partition(module: nn.Module) -> None:
        # The group must be named: without it, tensor-parallel shards of rank 0 would be broadcast to all ranks.
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=mesh.zero_group,
            zero_param_parallel_group=secondary,
            mpu=mpu,
            config_dict_or_path=config,
        )

    return partition


class ZeroEngine:
    """A model, its AdamW and its gradients, sharded at stage 0 to 3.

    One step: `accumulation_steps` times `loss = engine(...)` and `engine.backward(loss)`, then `engine.step(lr)`.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: Mapping[str, TensorShard],
        mesh: ParallelMesh,
        settings: ZeroSettings,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        device: torch.device,
        units: Sequence[nn.Module] = (),
    ):
        """`units`: modules whose parameters stage 3 gathers and releases together, in one message each."""
        self.model, self.shards, self.mesh, self.settings = model, shards, mesh, settings
        self.device = device
        for name, parameter in model.named_parameters():
            # Without this mark the clipping norm would leave out, or count twice, a rank's slice.
            if shards[name].dim is not None:
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.optimizer = torch.optim.AdamW(
            _decay_groups(model, shards, weight_decay),
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=device.type == "cuda",
            foreach=False if device.type == "cpu" else None,
        )
        for unit in units:
            set_z3_leaf_module(unit, settings.stage == 3)
        sizes = ModelSizes.of(model, units)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            mpu=ModelParallelUnit(mesh),
            config=deepspeed_config(settings, sizes),
            dist_init_required=False,
        )
        self._shares: SharesInReach | None = None
        if settings.stage == 3:
            self._tune_stage3(sizes)
        elif settings.stage == 2 and settings.offload_optimizer == "none":
            self._tune_stage2(sizes)
        self._state = ZeroState(model, mesh, settings.stage, self.engine.optimizer, self.optimizer)
        self._host_copies = HostCopies(device)
        self._grad_norm = torch.zeros((), device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Stage 0 in bf16 keeps fp32 weights and computes under autocast."""
        return self.engine(*args, **kwargs)

    def train(self) -> None:
        self.engine.train()

    def eval(self) -> None:
        self.engine.eval()

    def backward(self, loss: Tensor) -> None:
        """Accumulates a micro-batch's gradients, divided by accumulation_steps and averaged over dp x cp."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; the last one's step is `step`

    def step(self, learning_rate: float) -> bool:
        """One AdamW update after the last micro-batch; False if a loss scaler skipped it (fp16 overflow)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.settings.stage == 0:
            self._grad_norm = self._clip_whole_gradients()
        self._host_copies.before_change()
        with self._changing_shares():
            self.engine.step()
        if self.settings.stage > 0:
            self._grad_norm = self.engine.get_global_grad_norm()
        return bool(self.engine.was_step_applied())

    @property
    def grad_norm(self) -> Tensor | float:
        """2-norm of the last step's full gradient, before clipping, over all axes of the mesh."""
        return self._grad_norm

    # -- state, for checkpoints ----------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[StateFragment]:
        """This rank's share of the state, each element of the local model on exactly one rank of dp x cp."""
        return self._state.fragments()

    def snapshot(self, *, copy: bool) -> Snapshot:
        """The state now: copied into host memory that the next snapshot uses again, or, without `copy`, the live
        tensors, which the next step changes."""
        fragments = list(self.fragments())
        if copy:
            copies = iter(self._host_copies.take([part for one in fragments for part in one.tensors.values()]))
            fragments = [replace(one, tensors={kind: next(copies) for kind in one.tensors}) for one in fragments]
        return Snapshot(fragments, self.step_count, self.loss_scaler_state, self._host_copies.wait)

    def adopt_state(self, step_count: int) -> None:
        """Takes what was written into the tensors of `fragments()` as the model's state after `step_count` updates."""
        with self._changing_shares():
            self._state.adopt(step_count)

    @property
    def step_count(self) -> int:
        """Updates AdamW has made (skipped ones not counted); its bias correction depends on it."""
        return self._state.step_count

    @property
    def loss_scaler_state(self) -> dict[str, float]:
        """The dynamic loss scaler's numbers (fp16), empty otherwise."""
        scaler = self._loss_scaler()
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}

    @loss_scaler_state.setter
    def loss_scaler_state(self, state: Mapping[str, float]) -> None:
        scaler = self._loss_scaler()
        if scaler is not None:
            for key, value in state.items():
                setattr(scaler, key, value)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tune_stage2(self, sizes: ModelSizes) -> None:
        optimizer, group = self.engine.optimizer, self.mesh.zero_group
        zero_stage2.measure_norm_once(optimizer)
        if self.device.type == "cuda":  # where AdamW is fused
            zero_stage2.clip_as_adamw_reads(optimizer)
        few = group.size() <= zero_stage2.MOST_RANKS
        if few and (group.size() == 1 or reach_each_other(group, self.device)):
            zero_stage2.exchange_and_accumulate(optimizer, bucket_of_unit(sizes))

    def _tune_stage3(self, sizes: ModelSizes) -> None:
        if sizes.matrices_of_unit:
            self._fetch_ahead(_UNITS_AHEAD * sizes.matrices_of_unit)
        if self.device.type == "cuda":  # ranks on CPUs were seen to die of a damaged heap; docs/log.md
            zero_stage3.gather_without_copies(self.model)
            zero_stage3.reduce_without_interleaving(self.engine.optimizer)
        if self.settings.offload_optimizer == "none":
            zero_stage3.accumulate_together(self.engine.optimizer)
            if self.settings.overlap:  # else there is no stream but the one that computes
                zero_stage3.keep_host_ahead(self.engine.optimizer)
            zero_stage3.measure_norm_once(self.engine.optimizer)
            if self.device.type == "cuda":  # where AdamW is fused
                zero_stage3.update_in_one_pass(self.engine.optimizer)
            undivided = self.settings.secondary_partition_size == 1
            if undivided and self.mesh.zero_size > 1 and reach_each_other(self.mesh.zero_group, self.device):
                self._let_ranks_reach_each_other()

    def _let_ranks_reach_each_other(self) -> None:
        """On one host's GPUs: parameters are read where they lie, gradients sent as they are."""
        self._shares = SharesInReach(self.model, self.engine.optimizer, self.mesh.zero_group)
        zero_stage3.exchange_and_accumulate(self.engine.optimizer)

    def _changing_shares(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shares is None else self._shares.changing()

    def _fetch_ahead(self, parameters: int) -> None:
        """Lets the host issue the gathering of so many parameters before it waits for the device.

        DeepSpeed waits after every second one, which is right for a module of one or two: with a block of seven the
        host waits for each block to be computed before it can issue the next, and the device idles meanwhile.
        """
        coordinator = self.engine.optimizer.parameter_offload.get_param_coordinator()
        limit = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
        assert hasattr(coordinator, limit), "DeepSpeed names this limit otherwise now; it has no public setting"
        setattr(coordinator, limit, parameters)

    def _loss_scaler(self) -> Any:
        return getattr(self.engine.optimizer, "loss_scaler", None) if self.settings.precision == "fp16" else None

    def _clip_whole_gradients(self) -> Tensor:
        """Stage 0: DeepSpeed gives no norm for fp32 parameters, so the norm and the clipping are ours."""
        split = torch.zeros((), device=self.device)
        whole = torch.zeros((), device=self.device)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.float().pow(2).sum()
                if self.shards[name].dim is None:
                    whole += square
                else:
                    split += square
        dist.all_reduce(split, group=self.mesh.tp_group)
        norm = (split + whole).sqrt()
        if self.settings.gradient_clipping > 0:
            factor = (self.settings.gradient_clipping / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return norm


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _decay_groups(model: nn.Module, shards: Mapping[str, TensorShard], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not. By full shape: at stage 3 the local one is empty."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if len(shards[name].full_shape) > 1 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
