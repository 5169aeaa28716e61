"""Total memory of one rank of a job: its states and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.config import JobConfig
from launch.context_plan import plans_of_blocks
from launch.memory.formulas import Activations, States, estimate_activations, estimate_states, working_copies
from launch.memory.parameters import count_parameters
from launch.precision import BYTES
from model.recompute import Recompute
from parallel.mesh import MeshShape


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, by the formulas of `launch.memory.formulas`."""

    states: States
    working: int
    """Parameters gathered, or copied, to compute with."""
    activations: Activations

    @property
    def peak(self) -> int:
        """On the device, at the fullest moment of a step."""
        return self.states.on_device + self.working + self.activations.peak


def footprint(job: JobConfig, mesh: MeshShape, device: str, policies: Sequence[Recompute]) -> Footprint:
    """The memory of `job` on one rank of `mesh`, with a recomputation policy per block. `device` is "cpu" or "cuda"."""
    precision, stage, size = job.resolve_precision(device), job.parallel.zero_stage, mesh.tensor_parallel_size
    parameters = count_parameters(job.model, size)
    states = estimate_states(
        parameters,
        stage,
        precision,
        mesh.data_parallel_size * mesh.context_parallel_size,
        offload_optimizer=job.parallel.offload_optimizer != "none",
        offload_parameters=job.parallel.offload_parameters != "none",
        secondary_partition_size=job.parallel.secondary_partition_size,
    )
    activations = estimate_activations(
        job.model,
        tokens=local_tokens(job, mesh),
        tensor_parallel_size=size,
        sequence_parallel=job.sequence_parallel,
        context=plans_of_blocks(job, mesh, BYTES[precision]),
        precision=precision,
        autocast=stage == 0 and precision == "bf16",
        recompute=policies,
        compiled=job.compiles(device),
        mlp_tile_tokens=job.training.mlp_tile_tokens,
        offload=job.training.offload_activations != "none",
    )
    return Footprint(states, working_copies(parameters, stage, precision), activations)


def local_tokens(job: JobConfig, mesh: MeshShape) -> int:
    """Tokens of one micro-batch on one rank."""
    return job.training.micro_batch_size * job.training.sequence_length // mesh.context_parallel_size
