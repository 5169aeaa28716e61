"""ZeRO's settings, and their form for DeepSpeed: its configuration and its view of the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch.distributed as dist
from torch import nn

from parallel.mesh import ParallelMesh

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "cpu"]

LIVE_PARAMETERS = 1_000_000_000
"""Elements that stage 3 may keep gathered, at least: a smaller model stays gathered from forward to backward."""
_BUCKET = 100_000_000
"""Elements of the buffer in which gradients are reduced together, where no unit is larger."""
_LARGEST_BUCKET = 500_000_000


@dataclass(frozen=True)
class ZeroSettings:
    """What ZeRO needs to know of a job. `gradient_clipping` 0 means off."""

    stage: int
    precision: Precision
    micro_batch_size: int
    accumulation_steps: int
    gradient_clipping: float
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over dp x cp."""
    overlap: bool = True
    """Communicate beside computing."""
    offload_optimizer: Offload = "none"
    """Where master weights and moments live and are updated."""
    offload_parameters: Offload = "none"
    """Where the partitioned parameters of stage 3 live while they are not gathered."""
    secondary_partition_size: int = 1
    """Neighbours in dp x cp that share a second copy of the parameters, from which the backward pass gathers; 1: none
    (hpZ of ZeRO++, arXiv:2306.10209, section 3.2)."""


@dataclass(frozen=True)
class ModelSizes:
    """Elements on this rank before ZeRO; what buffers are made for."""

    total: int = 0
    largest_parameter: int = 0
    largest_unit: int = 0
    """The matrices of a module that stage 3 gathers as one."""
    matrices_of_unit: int = 0
    """How many these are, at most."""
    largest_vector: int = 0
    """Parameters that are no larger (norms, biases) stay whole at stage 3."""

    @classmethod
    def of(cls, model: nn.Module, units: Sequence[nn.Module]) -> Self:
        """The sizes of `model`, whose modules may be partitioned already."""
        whole = [_shape(parameter) for parameter in model.parameters()]
        shapes = [[_shape(parameter) for parameter in unit.parameters()] for unit in units]
        matrices = [[math.prod(shape) for shape in unit if len(shape) > 1] for unit in shapes]
        return cls(
            total=sum(map(math.prod, whole)),
            largest_parameter=max(map(math.prod, whole)),
            largest_unit=max(map(sum, matrices), default=0),
            matrices_of_unit=max(map(len, matrices), default=0),
            largest_vector=max((shape[0] for unit in shapes for shape in unit if len(shape) == 1), default=0),
        )


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def live_parameters(largest_unit: int) -> int:
    """Elements that stage 3 may keep gathered: no less than a unit that computes and the next, which is fetched."""
    return max(LIVE_PARAMETERS, 2 * largest_unit)


def bucket_of_unit(sizes: ModelSizes) -> int:
    """Elements whose gradients are reduced together.

    A compiled unit's gradients come all at once. Where they fill several buckets, computing waits for the first ones to
    be reduced; in one bucket with the unit's vectors they have until the next unit's come.
    """
    return max(1, min(max(_BUCKET, sizes.largest_unit + 16 * sizes.largest_vector), _LARGEST_BUCKET, sizes.total))


def _bucket(stage: int, sizes: ModelSizes) -> int:
    """Elements of DeepSpeed's buffer for them."""
    if stage < 3:
        # A gradient larger than the buffer is reduced where it lies, beside the computing, and DeepSpeed frees it
        # without telling the allocator of that stream: at 8B the embedding's memory was in use again too early, and the
        # gradient norm 28 times what it is.
        return max(bucket_of_unit(sizes), sizes.largest_parameter)
    return bucket_of_unit(sizes)


def deepspeed_config(settings: ZeroSettings, sizes: ModelSizes = ModelSizes()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """DeepSpeed's configuration."""
    sharded = settings.stage > 0
    bucket = _bucket(settings.stage, sizes)
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "gradient_clipping": settings.gradient_clipping if sharded else 0.0,
        "zero_optimization": {
            "stage": settings.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,  # DeepSpeed refuses odd ones
            # At stage 3 gradients are made contiguous where they are reduced (`parallel.zero_stage3`).
            "contiguous_gradients": settings.stage < 3,
            "overlap_comm": settings.overlap,
            # A unit is fetched while the one before it computes, and not a part of the one after it.
            "stage3_prefetch_bucket_size": sizes.largest_unit or bucket,
            "stage3_param_persistence_threshold": sizes.largest_vector,
            "stage3_max_live_parameters": live_parameters(sizes.largest_unit),
            "stage3_max_reuse_distance": live_parameters(sizes.largest_unit),
            "stage3_gather_16bit_weights_on_model_save": False,
            # DeepSpeed's replacement of torch's linear is compiled anew for each parameter, and saves nothing here.
            "memory_efficient_linear": False,
            "zero_hpz_partition_size": settings.secondary_partition_size,
            "offload_optimizer": {"device": settings.offload_optimizer},
            "offload_param": {"device": settings.offload_parameters},
        },
        "bf16": {"enabled": sharded and settings.precision == "bf16"},
        "fp16": {"enabled": settings.precision == "fp16"},
        # By DeepSpeed's own key: on GPUs its engine turns off an autocast it was not told of.
        "torch_autocast": {
            "enabled": settings.precision == "bf16" and not sharded,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # the modules whose gradients would be reduced in bf16
        },
        # DeepSpeed reduces and accumulates in the parameters' type unless told otherwise.
        "communication_data_type": settings.reduce_dtype,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        # Before and after every micro-batch, from the third step on, it would wait until the device has done all.
        "timers": {"throughput": {"enabled": False}},
    }


class ModelParallelUnit:
    """The mesh in the words DeepSpeed asks for. It must not define any *sequence_parallel* method."""

    def __init__(self, mesh: ParallelMesh):
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.zero_group

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.zero_size

    def get_data_parallel_rank(self) -> int:
        return self._mesh.zero_rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.zero_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tp_group

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tp_group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._mesh.tp_group, 0)

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0
