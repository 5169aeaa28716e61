"""The payloads behind docs/parallelism.md, against the bytes that two ranks hand to their collectives in one step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.layout_costs import Payload, exchange_payload, ring_payload, tensor_payload, zero_payloads
from launch.build import build_engine
from launch.config import JobConfig
from launch.precision import BYTES, Precision
from parallel import zero
from parallel.collectives import functional_collectives
from parallel.mesh import ParallelMesh
from tests.distributed.harness import run_distributed
from tests.distributed.two_rank_jobs import ACCUMULATION, HIDDEN, LAYERS, LENGTH, VOCABULARY, job_of, one_step

PERSISTENT = (2 * LAYERS + 1) * HIDDEN
"""The norms: what stage 3 keeps whole, gathered once a step."""
NEGLIGIBLE = 64  # bytes: flags and norms
CASES: list[tuple[Precision, str]] = [("fp32", "none"), ("fp32", "full"), ("bf16", "none"), ("bf16", "full")]
ZERO_CASES: list[tuple[int, Precision, str]] = [
    (stage, precision, reduced)
    for stage in (
        3,
        2,
        1,
        0,
    )  # once stage 0 has turned on DeepSpeed's autocast, it takes the types of all engines from it
    for precision, reduced in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
]
TILED = (3, "fp32", "tiled")


def traffic_of_a_step(job: JobConfig) -> tuple[Counter[str], int]:
    """Bytes by kind of collective in the second step, and the elements of this rank's parameters."""
    mesh = ParallelMesh.create(job.mesh_shape(dist.get_world_size()))
    with counted() as bytes_of:
        engine, _ = build_engine(job, mesh, torch.device("cpu"))
        one_step(engine, LENGTH // mesh.cp_size)
        bytes_of.clear()
        one_step(engine, LENGTH // mesh.cp_size)
        found = Counter({kind: size for kind, size in bytes_of.items() if size > NEGLIGIBLE})
    elements = sum(math.prod(shard.sizes) for shard in engine.shards.values())
    engine.engine.destroy()
    return found, elements


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what goes through torch's collectives, DeepSpeed's included (it keeps two of them by another name)."""
    from deepspeed.comm import comm

    bytes_of: Counter[str] = Counter()

    def counting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            # Two tensors are a part and the whole: the whole counts.
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            tensors += [torch.cat(value) for value in args if isinstance(value, list)]
            group = kwargs.get("group")
            if group is None or group.size() > 1:
                bytes_of[kind] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
            return function(*args, **kwargs)

        return count

    def counting_functional(kind: str, name: str) -> Any:
        function = getattr(functional_collectives, name)

        def count(tensor: torch.Tensor, *args: Any) -> Any:
            whole = args[-1].size() if kind == "all_gather" else 1  # it is given a part
            bytes_of[kind] += whole * tensor.numel() * tensor.element_size()
            return function(tensor, *args)

        return mock.patch.object(functional_collectives, name, count)

    def counting_ring(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                bytes_of["sent"] += operation.tensor.numel() * operation.tensor.element_size()
        return batch_isend_irecv(operations)

    batch_isend_irecv = dist.batch_isend_irecv
    with (
        mock.patch.object(dist, "all_reduce", counting("all_reduce", dist.all_reduce)),
        mock.patch.object(dist, "all_gather", counting("all_gather", dist.all_gather)),
        mock.patch.object(dist, "all_gather_into_tensor", counting("all_gather", dist.all_gather_into_tensor)),
        mock.patch.object(dist, "reduce_scatter_tensor", counting("reduce_scatter", dist.reduce_scatter_tensor)),
        counting_functional("all_reduce", "all_reduce"),
        counting_functional("all_gather", "all_gather_tensor"),
        counting_functional("reduce_scatter", "reduce_scatter_tensor"),
        mock.patch.object(dist, "batch_isend_irecv", counting_ring),
        mock.patch.object(comm.cdb, "all_gather_function", counting("all_gather", comm.cdb.all_gather_function)),
        mock.patch.object(
            comm.cdb, "reduce_scatter_function", counting("reduce_scatter", comm.cdb.reduce_scatter_function)
        ),
    ):
        yield bytes_of


def zero_traffic() -> list[tuple[Counter[str], int]]:
    ours = zero.deepspeed_config

    def without_reuse(*args: Any, **kwargs: Any) -> dict[str, Any]:
        """As for a model above the limit of live parameters: nothing stays gathered from forward to backward."""
        config = ours(*args, **kwargs)
        config["zero_optimization"] |= {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1}
        return config

    with mock.patch.object(zero, "deepspeed_config", without_reuse):
        jobs = [job_of(1, 1, stage, precision, reduce_dtype=reduced) for stage, precision, reduced in ZERO_CASES]
        return [traffic_of_a_step(job) for job in [*jobs, job_of(1, 1, 3, "fp32", tile=LENGTH // 8)]]


@pytest.fixture(scope="module")
def zero_measured() -> dict[tuple[int, Precision, str], tuple[Counter[str], int]]:
    return dict(zip([*ZERO_CASES, TILED], run_distributed(zero_traffic, 2)[0], strict=True))


def test_tiles_gather_no_weight_twice(zero_measured: dict) -> None:
    assert zero_measured[TILED] == zero_measured[3, "fp32", "fp32"]


@pytest.mark.parametrize(("stage", "precision", "reduced"), ZERO_CASES)
def test_zero(stage: int, precision: Precision, reduced: Precision, zero_measured: dict) -> None:
    found, elements = zero_measured[stage, precision, reduced]
    each, once = zero_payloads(elements, stage, precision, head=HIDDEN * VOCABULARY, reduced=BYTES[reduced])
    # Only the once-a-step gathering of the norms is stage 3's exception to "for one micro-batch".
    norms = (2 * ACCUMULATION - 1) * PERSISTENT * BYTES[precision] if stage == 3 else 0
    wanted = {
        "all_reduce": ACCUMULATION * each.all_reduced + once.all_reduced,
        "all_gather": ACCUMULATION * each.all_gathered + once.all_gathered - norms,
        "reduce_scatter": ACCUMULATION * each.reduce_scattered + once.reduce_scattered,
    }
    assert set(found) <= set(wanted)
    assert all(abs(found[kind] - size) <= NEGLIGIBLE for kind, size in wanted.items()), (found, wanted)


def model_traffic(tp: int, cp: int, mode: str, sequence_parallel: str = "auto") -> list[Counter[str]]:
    return [
        traffic_of_a_step(job_of(tp, cp, 1, precision, how, mode, sequence_parallel))[0] for precision, how in CASES
    ]


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallelism(sequence_parallel: bool) -> None:
    measured = run_distributed(model_traffic, 2, 2, 1, "auto", str(sequence_parallel).lower())[0]
    for (precision, how), found in zip(CASES, measured, strict=True):
        job = job_of(2, 1, 1, precision, how)
        wanted = tensor_payload(
            job.model, LENGTH, BYTES[precision], tp=2, checkpointing=how == "full", sequence_parallel=sequence_parallel
        )
        assert abs(found["all_reduce"] - ACCUMULATION * wanted.all_reduced) <= NEGLIGIBLE, (precision, how)
        assert found["all_gather"] == ACCUMULATION * wanted.all_gathered, (precision, how)
        assert found["reduce_scatter"] == ACCUMULATION * wanted.reduce_scattered, (precision, how)


@pytest.mark.parametrize(("mode", "payload"), [("ring", ring_payload), ("exchange", exchange_payload)])
def test_context_parallelism(mode: str, payload: Callable[..., float]) -> None:
    ranks = run_distributed(model_traffic, 2, 1, 2, mode)
    for number, (precision, how) in enumerate(CASES):
        job = job_of(1, 2, 1, precision, how, mode)
        wanted = payload(job.model, LENGTH // 2, BYTES[precision], tp=1, cp=2, checkpointing=how == "full")
        mean = sum(found[number]["sent"] for found in ranks) / len(ranks)
        assert mean == ACCUMULATION * wanted, (precision, how)


def test_shares_of_a_ring_algorithm() -> None:
    assert Payload(all_reduced=8, all_gathered=16, reduce_scattered=24).sent(4) == (2 * 8 + 16 + 24) * 3 / 4
