"""What every mode of context parallelism promises beside being right: documents that do not see each other forward or
backward, the same bits again when they are asked for, and an error in bf16 that does not grow with the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.kernels import KERNELS, AttentionOperator, KernelOperator
from parallel.exchange import ExchangeAttention
from parallel.mesh import MeshShape, ParallelMesh
from parallel.ring import RingAttention
from parallel.transport import MessageTransport
from parallel.ulysses import UlyssesAttention
from tests.distributed.context_cases import (
    LONG,
    NAMES,
    PRIMES,
    SCALE,
    B,
    Case,
    S,
    dense,
    full_inputs,
    local_part,
    results_of,
)
from tests.distributed.harness import run_distributed

WORLD = 8
LENGTH = 240
"""Of the sequences whose errors are compared: 2 x 8 chunks of 15."""

Make = Callable[[dict[str, Any]], AttentionOperator]


def modes() -> Iterator[tuple[str, Make]]:
    """Over the whole world. Collective: makes groups."""
    group, kernel = dist.group.WORLD, KERNELS["cpu"]
    yield "ring", lambda settings: RingAttention(group, kernel, **settings)
    for keep in (True, False):
        name = "exchange" if keep else "exchange, fetched again"
        yield (
            name,
            lambda settings, keep=keep: ExchangeAttention(
                MessageTransport(group), kernel, keep_gathered=keep, **settings
            ),
        )
    yield "heads", lambda settings: UlyssesAttention(MessageTransport(group), KernelOperator(kernel, **settings))
    neighbours, across = ParallelMesh.create(MeshShape(1, WORLD, 1)).split_context(2, torch.device("cpu"))
    yield (
        "exchange within heads",
        lambda settings: UlyssesAttention(
            MessageTransport(neighbours),
            ExchangeAttention(MessageTransport(across), kernel, keep_gathered=False, **settings),
            head_groups=2,
        ),
    )


def leak(attend: AttentionOperator, case: Case) -> dict[str, float]:
    """The largest change in all documents but the first of each row when everything in that one changes."""
    inputs = full_inputs(case)
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed:
        tensor[0, : PRIMES[0]] += 1
        tensor[1, : LONG[0]] += 1
    position = local_part(torch.arange(S).expand(B, S).contiguous(), dist.group.WORLD)
    others = position >= torch.tensor([[PRIMES[0]], [LONG[0]]])
    before, after = (
        results_of(attend, dist.group.WORLD, tensors, case, torch.float32) for tensors in (inputs, changed)
    )
    assert others.all() or any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return {
        name: (one - other)[others].abs().max().item() for name, one, other in zip(NAMES, before, after, strict=True)
    }


def squared_errors(results: list[torch.Tensor], case: Case) -> dict[str, tuple[float, float]]:
    """Of this rank's part and of the reference there, in fp64."""
    found = {}
    for name, result, full in zip(NAMES, results, dense(case, LENGTH), strict=True):
        part = local_part(full, dist.group.WORLD)
        found[name] = (result.double() - part).square().sum().item(), part.square().sum().item()
    return found


def _promises() -> dict[str, Any]:
    packed, plain = Case(lengths=PRIMES + LONG, heads=32, kv_heads=16), Case(heads=16, kv_heads=16)
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    for name, make in modes():
        settings = {"scale": SCALE, "deterministic": True}
        repeated = [results_of(make(settings), group, full_inputs(packed), packed, torch.bfloat16) for _ in range(2)]
        found[name] = {
            "leak": leak(make(settings), packed),
            "repeats": all(torch.equal(one, other) for one, other in zip(*repeated, strict=True)),
            "squares": squared_errors(
                results_of(make({"scale": SCALE}), group, full_inputs(plain, LENGTH), plain, torch.bfloat16), plain
            ),
        }
    q, k, v, dout = (tensor.bfloat16().requires_grad_() for tensor in full_inputs(plain, LENGTH))
    whole = KernelOperator(KERNELS["cpu"], scale=SCALE)
    out = whole(q, k, v, None)
    single = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    found["one rank"] = {
        name: ((result.double() - full).norm() / full.norm()).item()
        for name, result, full in zip(NAMES, single, dense(plain, LENGTH), strict=True)
    }
    return found


@pytest.fixture(scope="module")
def promises() -> list[dict[str, Any]]:
    return run_distributed(_promises, WORLD)


MODES = ["ring", "exchange", "exchange, fetched again", "heads", "exchange within heads"]


def test_these_are_all_modes(promises: list[dict[str, Any]]) -> None:
    assert set(promises[0]) == {*MODES, "one rank"}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_leaks_from_one_document_to_the_next(promises: list[dict[str, Any]], mode: str) -> None:
    for found in promises:
        assert found[mode]["leak"] == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_again(promises: list[dict[str, Any]], mode: str) -> None:
    assert all(found[mode]["repeats"] for found in promises)


@pytest.mark.parametrize("mode", MODES)
def test_the_error_of_eight_ranks_is_that_of_one(promises: list[dict[str, Any]], mode: str) -> None:
    for name in NAMES:
        wrong, whole = (sum(found[mode]["squares"][name][which] for found in promises) for which in (0, 1))
        alone = promises[0]["one rank"][name]
        assert 1e-4 < alone < 1e-2, "bf16 rounds, and no worse than it must"
        assert math.sqrt(wrong / whole) <= 1.3 * alone, name
