"""Every layout computes what one process computes: the dense twin, the comparison, the table that `make parity` prints.

The twin is the GPT on one device under plain torch: one batch, a mean over its tokens, `clip_grad_norm_`, `AdamW`. It
meets no mesh, no ZeRO and no accumulation. A case trains the same weights on the same batches through the real engine
and train step. Labels of -100 lie unevenly over rows and positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from launch.build import build_engine
from launch.data.batches import MicroBatch
from launch.stepper import Stepper
from model.attention import kernel_attention
from model.gpt import GPT
from model.kernels import select_kernel
from parallel import zero, zero_config
from parallel.materialize import materialize
from parallel.mesh import MeshShape, ParallelMesh
from parallel.state import rectangles
from parallel.tensor import TensorShard
from parallel.zero_config import ModelSizes, ZeroSettings
from tests.distributed.harness import run_distributed
from tests.distributed.parity_cases import (
    ACCUMULATION,
    GLOBAL_BATCH,
    LAYOUTS,
    LENGTH,
    STEPS,
    VOCABULARY,
    Case,
    all_cases,
)

TOLERANCE = 1e-5


@dataclass
class Trained:
    """What training left: the numbers of each step and the full weights."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, np.ndarray]


def global_batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) [GLOBAL_BATCH, LENGTH] of each step; half of the rows have few labels, all in their tail."""
    random = np.random.default_rng(7)
    for _ in range(STEPS):
        tokens = random.integers(0, VOCABULARY, (GLOBAL_BATCH, LENGTH + 1))
        labels = tokens[:, 1:].copy()
        for row, hidden in enumerate(random.integers(0, LENGTH - 2, GLOBAL_BATCH)):
            if row % 2:
                labels[row, :hidden] = -100
        yield tokens[:, :-1], labels


@cache
def dense_twin(variant: Case, device: str = "cpu") -> Trained:
    """One process, plain torch, no accumulation; bf16 by autocast. `variant` names model, precision and kernel."""
    config = variant.job().model
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.precision]
    kernel, _ = select_kernel(
        variant.backend, device_type=device, dtype=dtype, head_dim=config.head_dim, window=False, documents=False
    )
    with torch.device("meta"):
        model = GPT(config, kernel_attention(kernel, config))
    whole = {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    materialize(
        model,
        whole,
        model.initial_distribution,
        seed=0,
        device=torch.device(device),
        dtype=torch.float32,
        partition=lambda module: None,
    )
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.003,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    trained = Trained([], [], {})
    for input_ids, labels in global_batches():
        positions = np.tile(np.arange(LENGTH), (GLOBAL_BATCH, 1))
        arguments = [torch.from_numpy(array).to(device) for array in (input_ids, positions, labels)]
        with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
            loss_sum, token_count = model(*arguments)
        loss = loss_sum / token_count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        trained.losses.append(loss.item())
        trained.grad_norms.append(norm.item())
    trained.weights = {name: parameter.detach().cpu().numpy() for name, parameter in model.named_parameters()}
    return trained


class Rows:
    """A data-parallel rank's rows of the global batches, as the data pipeline would cut them."""

    def __init__(self, case: Case, dp_rank: int):
        self.case, self.dp_rank = case, dp_rank
        self.batches = list(global_batches())

    def micro_batches(self, step: int) -> list[MicroBatch]:
        rows = np.arange(GLOBAL_BATCH).reshape(ACCUMULATION, self.case.dp, -1)[:, self.dp_rank]
        input_ids, labels = self.batches[step]
        positions = np.tile(np.arange(LENGTH), (rows.shape[1], 1))
        return [MicroBatch(input_ids[chosen], labels[chosen], positions, None) for chosen in rows]


def train_cases(
    cases: Sequence[Case], mutate: Callable[[], None] | None = None, device_type: str = "cpu"
) -> list[dict]:
    """On every rank of a world: trains each case and returns the steps' numbers and this rank's pieces of the
    weights."""
    if mutate is not None:
        mutate()
    results = []
    mesh: ParallelMesh | None = None
    for case in cases:
        shape = MeshShape(case.tp, case.cp, case.dp)
        if mesh is None or mesh.shape != shape:
            mesh = ParallelMesh.create(shape)
        results.append(_train(case, mesh, device_type))
    return results


def _train(case: Case, mesh: ParallelMesh, device_type: str) -> dict[str, Any]:
    job = case.job()
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    engine, _ = build_engine(job, mesh, device)
    rows = Rows(case, mesh.dp_rank)
    stepper = Stepper(job, mesh, engine)
    losses, norms = [], []
    for step in range(STEPS):
        outcome = stepper.train(step, stepper.cut(rows.micro_batches(step)))
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
    pieces = [
        (part.key.removeprefix("parameter/"), part.full_shape, part.offsets, part.tensor.detach().cpu().numpy().copy())
        for fragment in engine.fragments()
        if mesh.tp_rank == 0 or engine.shards[fragment.name].dim is not None
        for part in rectangles(
            replace(fragment, tensors={"parameter": fragment.tensors["parameter"]}), engine.shards[fragment.name]
        )
    ]
    return {"losses": losses, "grad_norms": norms, "pieces": pieces}


def assemble(ranks: Sequence[dict[str, Any]]) -> Trained:
    """Full weights from all ranks' pieces; every element must come exactly once."""
    weights: dict[str, np.ndarray] = {}
    count: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, shape, offsets, values in rank["pieces"]:
            where = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            weights.setdefault(name, np.zeros(shape, values.dtype))[where] = values
            count.setdefault(name, np.zeros(shape, np.int64))[where] += 1
    for name, times in count.items():
        assert (times == 1).all(), f"{name}: elements held {times.min()} to {times.max()} times"
    return Trained(ranks[0]["losses"], ranks[0]["grad_norms"], weights)


@dataclass(frozen=True)
class Errors:
    """Largest relative differences from the twin."""

    loss: float
    grad_norm: float
    weight: float
    worst_weight: str

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad_norm, self.weight)


def compare(found: Trained, twin: Trained) -> Errors:
    """Relative to each step's number, and for a weight to the largest element of its tensor."""
    assert found.weights.keys() == twin.weights.keys()
    weights = {
        name: float(np.abs(found.weights[name] - value).max() / np.abs(value).max())
        for name, value in twin.weights.items()
    }
    worst = max(weights, key=lambda name: weights[name] if np.isfinite(weights[name]) else np.inf)
    return Errors(
        loss=_relative(found.losses, twin.losses),
        grad_norm=_relative(found.grad_norms, twin.grad_norms),
        weight=weights[worst],
        worst_weight=worst,
    )


def _relative(found: Sequence[float], expected: Sequence[float]) -> float:
    return float(np.max(np.abs(np.array(found) - expected) / np.abs(expected)))


def run_cases(
    cases: Sequence[Case], mutate: Callable[[], None] | None = None, device_type: str = "cpu"
) -> dict[Case, Errors]:
    """Trains cases of one layout in one world and compares each with its twin on the same kind of device."""
    by_rank = run_distributed(
        train_cases, cases[0].world_size, cases, mutate, device_type, timeout=600, device_type=device_type
    )
    return {
        case: compare(assemble([results[index] for results in by_rank]), dense_twin(case.model_variant(), device_type))
        for index, case in enumerate(cases)
    }


def many_buckets() -> None:
    """Not a fault: a `mutate` under which gradients of the cases' small models fill many buckets, as those of large
    ones do. One would hold all of them, and nothing be reduced while others are computed."""
    zero_config._LARGEST_BUCKET = 8000
    config = zero.deepspeed_config

    def checked(settings: ZeroSettings, sizes: ModelSizes = ModelSizes()) -> dict[str, Any]:  # noqa: B008 (frozen)
        found = config(settings, sizes)
        assert sizes.total == 0 or 4 * found["zero_optimization"]["reduce_bucket_size"] < sizes.total
        return found

    zero.deepspeed_config = checked


@cache
def errors_of_layout(layout: tuple[int, int, int]) -> dict[Case, Errors]:
    """All cases of a layout share one world."""
    return run_cases([case for case in all_cases() if case.layout == layout])


def main() -> None:
    """Prints the table: for each case, the largest relative error of loss, gradient norm and weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--layout", help="only this tp x cp x dp, as 2x2x1")
    options = parser.parse_args()
    print(f"{'tp x cp x dp':34} {'loss':>9} {'grad norm':>9} {'weights':>9}   (tolerance {TOLERANCE:g})")
    worst = 0.0
    for layout in LAYOUTS:
        if options.layout and options.layout != "x".join(map(str, layout)):
            continue
        for case, errors in errors_of_layout(layout).items():
            print(f"{case!s:34} {errors.loss:9.1e} {errors.grad_norm:9.1e} {errors.weight:9.1e}", flush=True)
            worst = max(worst, errors.largest)
    print(f"largest error {worst:.1e}")
    raise SystemExit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
