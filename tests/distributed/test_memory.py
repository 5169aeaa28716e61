"""The states that `--check` promises, and those of a model that only computes, against what two ranks hold."""

from __future__ import annotations

import gc
import warnings

import torch
from torch import nn

from launch.memory.formulas import estimate_states, host_copies
from launch.precision import Precision
from parallel import zero, zero_config
from parallel.mesh import MeshShape, ParallelMesh
from parallel.tensor import TensorShard
from parallel.zero_config import Offload
from parallel.zero_inference import InferenceEngine
from tests.distributed.harness import run_distributed

LAYOUTS: list[tuple[int, Precision, Offload, int]] = [
    *((stage, precision, "none", 1) for stage in range(4) for precision in ("fp32", "bf16")),
    *((stage, "bf16", "cpu", 1) for stage in (2, 3)),
    (3, "bf16", "none", 2),
]
"""Stage, precision, where the optimizer is, ranks of a secondary partition."""
WIDTH, DEPTH = 384, 8  # matrices above the size up to which stage 3 keeps parameters whole (100,000 elements)
BUFFER = 2 * 4 * WIDTH**2  # bytes: below stage 3 two buckets take turns, each as large as the largest gradient
SMALL = WIDTH**2  # bytes; what is smaller is bookkeeping, not state


def held_bytes() -> list[tuple[int, int]]:
    """Bytes on this rank, by layout, with gradients of two of three micro-batches accumulated: of the states, and of
    what a snapshot for an asynchronous save then adds."""
    zero_config._LARGEST_BUCKET = 1000  # no communication buffer larger than it must be
    mesh = ParallelMesh.create(MeshShape(data_parallel_size=2))
    return [_held_by_one(mesh, *layout) for layout in LAYOUTS]


def _layers(
    mesh: ParallelMesh, settings: zero_config.ZeroSettings, dtype: torch.dtype
) -> tuple[nn.Sequential, dict[str, TensorShard]]:
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]
    model = nn.Sequential(*layers).to(dtype)
    shards = {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    partition = zero.partitioner(mesh, settings)
    for layer in layers:
        partition(layer)
    return model, shards


def _held_by_one(
    mesh: ParallelMesh, stage: int, precision: Precision, offload: Offload, secondary: int
) -> tuple[int, int]:
    before = _storages()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    settings = zero_config.ZeroSettings(
        stage,
        precision,
        micro_batch_size=1,
        accumulation_steps=3,
        gradient_clipping=1.0,
        offload_optimizer=offload,
        secondary_partition_size=secondary,
    )
    model, shards = _layers(mesh, settings, dtype if stage > 0 else torch.float32)
    engine = zero.ZeroEngine(
        model, shards, mesh, settings, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, device=torch.device("cpu")
    )
    for _ in range(2):
        inputs = torch.randn(1, WIDTH, dtype=dtype if stage > 0 else torch.float32)
        engine.backward(engine(inputs).float().square().mean())
    states = {address: size for address, size in _storages().items() if address not in before and size >= SMALL}
    snapshot = engine.snapshot(copy=True)
    parts = [part.untyped_storage() for fragment in snapshot.fragments for part in fragment.tensors.values()]
    copies = {storage.data_ptr(): storage.nbytes() for storage in parts}
    assert not copies.keys() & states.keys()
    engine.engine.destroy()
    return sum(states.values()), sum(copies.values())


def _storages() -> dict[int, int]:
    """Bytes of every tensor that is alive, by address."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of torch's deprecated names warn when they are looked at
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_states_and_host_copies_are_as_estimated() -> None:
    parameters = DEPTH * WIDTH**2
    for rank, held in enumerate(run_distributed(held_bytes, 2)):
        for (stage, precision, offload, secondary), (found, copies) in zip(LAYOUTS, held, strict=True):
            expected = estimate_states(
                parameters,
                stage,
                precision,
                2,
                offload_optimizer=offload == "cpu",
                secondary_partition_size=secondary,
            ).total
            layout = (
                f"rank {rank}, stage {stage}, {precision}, {offload} offloaded, secondary {secondary}: {found} bytes "
                f"held, {expected} expected"
            )
            assert 0.995 * expected <= found <= expected + BUFFER, layout
            saved = 0 if stage == 0 and rank else host_copies(parameters, stage, 2)
            assert copies == saved, f"rank {rank}, stage {stage}: {copies} bytes copied, not {saved}"


def held_to_compute() -> list[int]:
    """Bytes on this rank after a forward pass, by stage."""
    mesh, found = ParallelMesh.create(MeshShape(data_parallel_size=2)), []
    for stage in range(4):
        before = _storages()
        settings = zero_config.ZeroSettings(
            stage, "bf16", micro_batch_size=1, accumulation_steps=1, gradient_clipping=0.0
        )
        engine = InferenceEngine(*_layers(mesh, settings, torch.bfloat16), mesh, settings)
        for fragment in engine.fragments():
            fragment.tensors["parameter"].fill_(1 / WIDTH)
        engine.adopt_state()
        outputs = engine(torch.ones(1, WIDTH, dtype=torch.bfloat16))
        assert torch.equal(outputs, torch.ones_like(outputs)), "every weight was given to a rank and reached all"
        held = {address: size for address, size in _storages().items() if address not in before and size >= SMALL}
        found.append(sum(held.values()))
    return found


def test_a_model_that_only_computes_holds_its_parameters_and_nothing_else() -> None:
    whole = 2 * DEPTH * WIDTH**2
    for held in run_distributed(held_to_compute, 2):
        assert held[:3] == [whole] * 3
        assert whole / 2 <= held[3] <= whole / 2 + 4 * WIDTH**2, "its half, and at most two matrices gathered"
