"""The ZeRO engine at every stage: what each rank keeps, the gradient it steps with, and the memory of building it."""

from __future__ import annotations

import ctypes
import math
import resource
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from model.attention import attention_of_blocks, kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS
from parallel.materialize import materialize
from parallel.mesh import MeshShape, ParallelMesh
from parallel.ring import RingAttention
from parallel.sequence import shard_sequence
from parallel.state import rectangles
from parallel.tensor import TensorShard, apply_tensor_parallel, sum_partial_gradients
from parallel.zero import ZeroEngine, partitioner
from parallel.zero_config import ZeroSettings
from parallel.zero_state import MOMENTS, StateFragment
from tests.distributed.harness import run_distributed

CPU = torch.device("cpu")
ROWS, S, ACCUMULATION = 8, 16, 2
BETAS = (0.9, 0.95)
MESHES = {(1, 1, 4): 0.0, (2, 1, 2): 0.05, (1, 2, 2): 0.05, (2, 2, 1): 0.0}
"""tp x cp x dp, and the norm that gradients are clipped to (0: not at all)."""

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    qk_norm=True,
    attention_bias="all",
    tie_word_embeddings=True,
)


def build(config: ModelConfig, mesh: ParallelMesh) -> tuple[GPT, dict[str, TensorShard]]:
    """The model on the meta device, cut by tensor parallelism."""
    attention = kernel_attention(KERNELS["math"], config)
    if mesh.cp_size > 1:
        attention = attention_of_blocks(
            config, lambda _: RingAttention(mesh.cp_group, KERNELS["math"], scale=config.head_dim**-0.5)
        )
    with torch.device("meta"):
        model = GPT(config, attention)
    return model, apply_tensor_parallel(model, model.tensor_parallel_plan, mesh.tp_group)


def fill(model: GPT, shards: dict[str, TensorShard], partition: object = lambda module: None) -> None:
    assert callable(partition)
    materialize(
        model,
        shards,
        lambda name: (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.3),
        seed=3,
        device=CPU,
        dtype=torch.float32,
        partition=partition,
    )


def make_engine(mesh: ParallelMesh, stage: int, clipping: float, **options: Any) -> ZeroEngine:
    settings = ZeroSettings(stage, "fp32", ROWS // ACCUMULATION // mesh.dp_size, ACCUMULATION, clipping, **options)
    model, shards = build(CONFIG, mesh)
    fill(model, shards, partitioner(mesh, settings))
    sum_partial_gradients(model, shards, mesh.tp_group)
    return ZeroEngine(model, shards, mesh, settings, betas=BETAS, eps=1e-8, weight_decay=0.1, device=CPU)


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, position_ids, labels [ROWS, S]; labels are unevenly ignored."""
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (ROWS, S + 1))
    labels = tokens[:, 1:].copy()
    labels[::3, :11] = -100
    return tokens[:, :-1], np.broadcast_to(np.arange(S), (ROWS, S)).copy(), labels


@cache
def dense_twin() -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Full weights, the gradient of the mean loss over all tokens, and its norm."""
    with torch.device("meta"):
        model = GPT(CONFIG, kernel_attention(KERNELS["math"], CONFIG))
    fill(model, {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()})
    loss, count = model(*(torch.from_numpy(array) for array in batch()))
    (loss / count).backward()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    return weights, gradients, norm


def train_step(engine: ZeroEngine) -> None:
    mesh, arrays = engine.mesh, batch()
    tokens = (arrays[2] != -100).sum().item()
    mine = [shard_sequence(a, mesh.cp_size, mesh.cp_rank)[mesh.dp_rank :: mesh.dp_size] for a in arrays]
    engine.train()
    for part in zip(*(np.array_split(array, ACCUMULATION) for array in mine), strict=True):
        loss_sum, _ = engine(*(torch.from_numpy(array) for array in part))
        engine.backward(loss_sum * (ACCUMULATION * mesh.zero_size / tokens))
    assert engine.step(0.01)


# -- what each rank keeps ----------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """One rank's state. Fragments by parameter: (start, numel); rectangles: key, offsets, values."""

    mesh: tuple[int, int]
    """(tp_rank, zero_rank)."""
    ranges: dict[str, tuple[int, int]]
    local_numel: dict[str, int]
    parts: list[tuple[str, tuple[int, ...], np.ndarray]]
    steps: int
    grad_norm: float


def keep(engine: ZeroEngine) -> Kept:
    fragments: list[StateFragment] = list(engine.fragments())
    for fragment in fragments:
        assert fragment.tensors.keys() == {"parameter", *MOMENTS}
        assert all(t.shape == (fragment.numel,) and t.dtype == torch.float32 for t in fragment.tensors.values())
    with torch.device("meta"):
        local, _ = build(CONFIG, engine.mesh)
    parts = [part for fragment in fragments for part in rectangles(fragment, engine.shards[fragment.name])]
    return Kept(
        (engine.mesh.tp_rank, engine.mesh.zero_rank),
        {fragment.name: (fragment.start, fragment.numel) for fragment in fragments},
        {name: parameter.numel() for name, parameter in local.named_parameters()},
        [(part.key, part.offsets, part.tensor.detach().numpy().copy()) for part in parts],
        engine.step_count,
        float(engine.grad_norm),
    )


def _before_and_after_a_step(stage: int) -> list[tuple[Kept, Kept]]:
    found = []
    for sizes, clipping in MESHES.items():
        engine = make_engine(ParallelMesh.create(MeshShape(*sizes)), stage, clipping)
        before = keep(engine)
        train_step(engine)
        found.append((before, keep(engine)))
    return found


def check_tiling(ranks: list[Kept]) -> None:
    """Flat ranges tile each rank's local tensors once over its dp x cp."""
    for tp_rank in {rank.mesh[0] for rank in ranks}:
        peers = [rank for rank in ranks if rank.mesh[0] == tp_rank]
        for name, numel in peers[0].local_numel.items():
            ranges = sorted(peer.ranges[name] for peer in peers if name in peer.ranges)
            end = 0
            for start, length in ranges:
                assert start == end and length > 0, f"{name}: {ranges} leaves a gap or overlaps"
                end += length
            assert end == numel, f"{name}: {ranges} is not all of {numel}"


def assembled(ranks: list[Kept], tp_size: int) -> dict[str, np.ndarray]:
    """Full tensors by key; each element written once, or once by each tensor-parallel rank that holds it whole."""
    weights, _, _ = dense_twin()
    values, counts = {}, {}
    for kind in ("parameter", *MOMENTS):
        for name, weight in weights.items():
            values[f"{kind}/{name}"] = np.full(tuple(weight.shape), np.nan, dtype=np.float32)
            counts[f"{kind}/{name}"] = np.zeros(tuple(weight.shape), dtype=int)
    for rank in ranks:
        for key, offsets, part in rank.parts:
            where = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
            held = values[key][where]
            assert np.array_equal(held[counts[key][where] > 0], part[counts[key][where] > 0]), f"{key}: ranks disagree"
            values[key][where] = part
            counts[key][where] += 1
    for key, count in counts.items():
        replicated = key.endswith(("norm.weight", "o_proj.bias"))
        assert (count == (tp_size if replicated else 1)).all(), key
    return values


@pytest.mark.parametrize("stage", range(4))
def test_state_and_gradient(stage: int) -> None:
    """AdamW's first moment after one step from zero is (1 - beta1) x the gradient it was given."""
    weights, gradients, norm = dense_twin()
    results = run_distributed(_before_and_after_a_step, 4, stage)
    for number, ((tp_size, cp_size, dp_size), clipping) in enumerate(MESHES.items()):
        factor = clipping / norm if clipping else 1.0
        assert factor < 0.5 or not clipping, "clipping must matter"
        before, after = ([rank[number][moment] for rank in results] for moment in (0, 1))
        check_tiling(before)
        check_tiling(after)
        assert {rank.steps for rank in before} == {0} and {rank.steps for rank in after} == {1}

        start = assembled(before, tp_size)
        for name, weight in weights.items():
            assert np.array_equal(start[f"parameter/{name}"], weight.numpy()), "the same weights, bit for bit"
            assert all(not start[f"{moment}/{name}"].any() for moment in MOMENTS), "moments exist and are zero"

        for rank in after:
            assert abs(rank.grad_norm / norm - 1) < 1e-5, "before clipping, over all axes"
        end = assembled(after, tp_size)
        for name, gradient in gradients.items():
            expected = gradient.double().numpy() * factor
            for moment, value in (
                ("exp_avg", (1 - BETAS[0]) * expected),
                ("exp_avg_sq", (1 - BETAS[1]) * expected**2),
            ):
                error = np.abs(end[f"{moment}/{name}"] - value).max() / np.abs(value).max()
                assert error < 2e-5, f"{moment}/{name}, {tp_size} x {cp_size} x {dp_size}"
            assert not np.array_equal(end[f"parameter/{name}"], start[f"parameter/{name}"]), "and the step was made"


# -- the host's pace ---------------------------------------------------------------------------------------------------


def _waits_for_the_device() -> list[list[int]]:
    """How often the host waits until the device has done all it was given: in each step, of an engine of each stage."""
    mesh, found = ParallelMesh.create(MeshShape(data_parallel_size=2)), []
    for stage in range(4):
        engine, waits = make_engine(mesh, stage, 0.05), []
        for _ in range(4):
            with mock.patch.object(type(get_accelerator()), "synchronize") as synchronize:
                train_step(engine)
            waits.append(synchronize.call_count)
        found.append(waits)
    return found


def test_the_host_does_not_wait_for_the_device() -> None:
    """DeepSpeed's timers begin with the third step."""
    assert run_distributed(_waits_for_the_device, 2) == [[[0] * 4] * 4] * 2


# -- state that is offloaded -------------------------------------------------------------------------------------------


def _hand_over_offloaded_state() -> list[float]:
    """For stages 2 and 3: the largest difference after a second step between an offloaded engine and one that took its
    state after the first, offloaded or not."""
    mesh, differences = ParallelMesh.create(MeshShape(data_parallel_size=2)), []
    for stage, parameters in ((2, "none"), (3, "none"), (3, "cpu")):
        offloaded = {"offload_optimizer": "cpu", "offload_parameters": parameters}
        first = make_engine(mesh, stage, 0.05, **offloaded)
        train_step(first)
        state = [tensor.clone() for fragment in first.fragments() for tensor in fragment.tensors.values()]
        train_step(first)
        expected = [fragment.tensors["parameter"].clone() for fragment in first.fragments()]
        for options in (offloaded, {}):
            second = make_engine(mesh, stage, 0.05, **options)
            parts = [tensor for fragment in second.fragments() for tensor in fragment.tensors.values()]
            for part, value in zip(parts, state, strict=True):
                part.data.copy_(value)
            second.adopt_state(step_count=1)
            train_step(second)
            found = [fragment.tensors["parameter"] for fragment in second.fragments()]
            differences.append(max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))
            assert second.step_count == first.step_count == 2 and any(part.any() for part in state)
    return differences


def test_offloaded_state_is_handed_over() -> None:
    for differences in run_distributed(_hand_over_offloaded_state, 2):
        assert len(differences) == 6 and max(differences[::2]) == 0, "bit for bit on the same layout"
        assert max(differences) < 1e-6


# -- memory of building ------------------------------------------------------------------------------------------------

LARGE = ModelConfig(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_key_value_heads=8,
)
"""51.5 million parameters, 206 MB; the largest matrix is 3 MB."""


def resident_bytes() -> int:
    """Memory in use. What is freed goes back to the system first: the allocator may keep as much as it hands out, as
    the hole that a whole matrix leaves does not hold two halves and their headers."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _growth_while_building(stage: int) -> tuple[int, int, int, int]:
    """Bytes: of the whole model, of the most that a rank's memory grew by, of the most weights that were whole at once,
    and of the largest module's own weights."""
    mesh = ParallelMesh.create(MeshShape(data_parallel_size=2))
    model, shards = build(LARGE, mesh)
    share = partitioner(mesh, ZeroSettings(stage, "fp32", 1, 1, 0.0))
    parameters = [parameter.numel() * 4 for parameter in model.parameters()]
    base, growth, whole_at_once = resident_bytes(), 0, 0

    def partition(module: nn.Module) -> None:
        nonlocal growth, whole_at_once
        growth = max(growth, resident_bytes() - base)
        whole_at_once = max(whole_at_once, sum(p.numel() * 4 for p in model.parameters() if not p.is_meta))
        share(module)
        growth = max(growth, resident_bytes() - base)

    fill(model, shards, partition)
    dist.barrier()
    return sum(parameters), growth, whole_at_once, max(parameters)


def _growths() -> list[tuple[int, int, int, int]]:
    return [_growth_while_building(3), _growth_while_building(0)]


def test_no_rank_of_stage_3_ever_holds_the_whole_model() -> None:
    for sharded, control in run_distributed(_growths, 2):
        whole, growth, whole_at_once, largest = sharded
        assert whole > 200e6
        assert whole_at_once == largest, "one module's weights at a time"
        assert 0.5 * whole < growth < 0.6 * whole, "this rank's half and one module"
        assert control[1] > 0.95 * whole and control[2] == whole, "below stage 3 the same measure sees all of it"
