"""Layout parity, and proof that the parity suite notices when something is broken."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import deepspeed
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import launch.build
import launch.feed
import launch.stepper
import parallel.collectives
import parallel.key_gradients
import parallel.mesh
import parallel.ring
import parallel.tensor
import parallel.transport
from model.kernels.cpu import CpuKernel
from parallel.sequence import Part
from parallel.tensor import TensorShard
from tests.distributed import parity
from tests.distributed.parity import TOLERANCE, Errors, errors_of_layout, many_buckets, run_cases
from tests.distributed.parity_cases import LAYOUTS, Case, all_cases


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_layout_computes_what_one_process_computes(case: Case) -> None:
    errors = errors_of_layout(case.layout)[case]
    assert errors.largest < TOLERANCE, errors


def test_the_cases_cover_what_they_should() -> None:
    cases = all_cases()
    assert {(case.tp, case.cp, case.dp) for case in cases} == set(LAYOUTS)
    assert {case.stage for case in cases} == {0, 1, 2, 3} and len(set(cases)) == len(cases) == 118


def test_gradients_reduced_in_many_buckets() -> None:
    """DeepSpeed's two buffers in turn, while other gradients are computed (DeepSpeed #4298, #5347)."""
    for layout, stages in (((1, 1, 2), (1, 2, 3)), ((2, 1, 2), (2,))):
        for case, errors in run_cases([Case(*layout, stage, False) for stage in stages], many_buckets).items():
            assert errors.largest < TOLERANCE, (case, errors)


# -- mutations: each runs inside the ranks, and the comparison must fail ----------------------------------------------


def partial_gradients_stay_partial() -> None:
    """QK-norm's weights act on each rank's heads: without the sum over tp their gradients are partial."""
    launch.build.sum_partial_gradients = lambda model, shards, group: None  # type: ignore[assignment]


def norm_gradients_stay_partial() -> None:
    """Under sequence parallelism a norm sees a rank's tokens only."""
    apply = launch.build.apply_tensor_parallel

    def forgetful(*args: Any, **options: Any) -> dict[str, TensorShard]:
        shards = apply(*args, **options)
        return {
            name: shard
            if "attention.q_norm" in name or "attention.k_norm" in name
            else replace(shard, partial_gradient=False)
            for name, shard in shards.items()
        }

    launch.build.apply_tensor_parallel = forgetful


def input_gradients_stay_partial() -> None:
    """The gradient entering a column-parallel region is not reduced over tp."""
    parallel.tensor.copy_to_group = lambda tensor, group: tensor  # type: ignore[assignment]


def scattered_sums_stay_partial() -> None:
    """A rank keeps its part of its own partial sum."""

    def own_part(tensor: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        return tensor.chunk(group.size(), dim=1)[torch.distributed.get_rank(group)].contiguous()

    parallel.collectives.reduce_scattered = own_part


def ring_keeps_its_own_keys() -> None:
    """Every step works on the rank's own keys and values again."""

    def pass_on(outgoing: torch.Tensor, incoming: torch.Tensor, group: object) -> list:
        incoming.copy_(outgoing)
        return []

    parallel.ring._pass_on = pass_on  # type: ignore[assignment]


def exchange_fetches_nothing() -> None:
    """What peers send, keys and their gradients, arrives as zeros."""
    exchange = parallel.transport.MessageTransport.exchange

    def empty(self: Any, slot: torch.Tensor, rows: Any, place: Any) -> Any:
        def nothing(owner: int, pieces: list[torch.Tensor]) -> None:
            place(owner, [torch.zeros_like(piece) for piece in pieces])

        return exchange(self, slot, rows, nothing)

    parallel.transport.MessageTransport.exchange = empty  # type: ignore[method-assign]


def key_gradients_stay_away() -> None:
    """An owner adds up its own shares of dK and dV only."""
    collect = parallel.key_gradients.KeyGradients.collect

    def forgetful(self: parallel.key_gradients.KeyGradients, *gradients: torch.Tensor) -> None:
        assert self.arrival is not None
        self.arrival.wait()
        self.arrival = Mock()
        self.incoming.clear()
        collect(self, *gradients)

    parallel.key_gradients.KeyGradients.collect = forgetful  # type: ignore[method-assign]


def shards_are_contiguous() -> None:
    """Each rank gets one contiguous part instead of two zigzag chunks."""

    def shard(array: NDArray, size: int, rank: int) -> NDArray:
        length = array.shape[1] // size
        return array[:, rank * length : (rank + 1) * length]

    def parts(length: int, size: int, *_: object) -> list[Part]:
        return [[(rank * length // size, (rank + 1) * length // size)] for rank in range(size)]

    launch.feed.shard_sequence = shard  # type: ignore[assignment]
    launch.feed.causal_parts = parts  # type: ignore[assignment]


def every_block_has_the_window() -> None:
    """One operator serves all blocks."""
    launch.build.attention_of_blocks = lambda config, attention: [attention(config.sliding_window)] * 2


def norm_without_the_tensor_parallel_mark() -> None:
    """DeepSpeed then counts every sharded weight on one rank only when it clips."""
    initialize = deepspeed.initialize

    def forgetful(*, model: torch.nn.Module, **rest: object) -> object:
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        return initialize(model=model, **rest)

    deepspeed.initialize = forgetful


def secondary_partitions_of_consecutive_ranks() -> None:
    """As DeepSpeed makes them by itself: with tensor parallelism they mix slices of different ranks."""
    parallel.mesh.ParallelMesh.split_zero = lambda mesh, size: parallel.mesh._own_group(  # type: ignore[method-assign]
        "secondary", mesh.rank, mesh.shape.grid.reshape(-1, size)
    )


def mean_of_means() -> None:
    """Each rank normalises by its own tokens: wrong wherever labels are masked unevenly."""

    class NoReduction:
        """torch.distributed without the first all-reduce of a step, the one of the token counts."""

        def __getattr__(self, name: str) -> object:
            return getattr(torch.distributed, name)

        def all_reduce(self, tensor: torch.Tensor, **rest: object) -> None:
            if tensor.numel() == 1 and float(tensor) == int(tensor):
                tensor *= torch.distributed.get_world_size()
            else:
                torch.distributed.all_reduce(tensor, **rest)

    launch.stepper.dist = NoReduction()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("mutation", "case"),
    [
        (partial_gradients_stay_partial, Case(2, 1, 1, 2, False)),
        (norm_gradients_stay_partial, Case(2, 1, 1, 1, False)),
        (input_gradients_stay_partial, Case(2, 1, 1, 0, False, sequence_parallel="false")),
        (scattered_sums_stay_partial, Case(2, 1, 1, 0, False)),
        (ring_keeps_its_own_keys, Case(1, 2, 1, 1, False, mode="ring")),
        (exchange_fetches_nothing, Case(1, 2, 1, 1, False, mode="exchange")),
        (key_gradients_stay_away, Case(1, 2, 1, 2, False, mode="exchange")),
        (shards_are_contiguous, Case(1, 2, 1, 2, False)),
        (every_block_has_the_window, Case(1, 2, 1, 0, False, windowed=True)),
        (norm_without_the_tensor_parallel_mark, Case(2, 1, 1, 3, False)),
        (
            secondary_partitions_of_consecutive_ranks,
            Case(2, 1, 2, 3, False, parallel="secondary_partition_size: 2"),
        ),
        (mean_of_means, Case(1, 1, 2, 1, False)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_fault_is_noticed(mutation, case: Case) -> None:  # type: ignore[no-untyped-def]
    errors = run_cases([case], mutation)[case]
    assert not errors.largest < 100 * TOLERANCE, f"not noticed: {errors}"
    assert not np.isnan(errors.loss)


def attention_computes_in_bf16() -> None:
    """Not a fault: the kernel takes nothing else, so that no stage passes because its autocast is off."""
    forward = CpuKernel.forward

    def insisting(self: CpuKernel, q: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert q.dtype == torch.bfloat16, q.dtype
        return forward(self, q, *rest, **named)

    CpuKernel.forward = insisting  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=lambda layout: "x".join(map(str, layout)))
def test_bf16_stays_within_its_rounding(layout: tuple[int, int, int]) -> None:
    """Against the twin under autocast: the mean loss moves by less than one rounding of bf16 (2^-8), the norm by a
    few."""
    cases = [Case(*layout, stage, False, precision="bf16", backend="cpu") for stage in range(4)]
    for case, errors in run_cases(cases, attention_computes_in_bf16).items():
        assert errors.loss < 4e-3 and errors.grad_norm < 2e-2, (case, errors)


def test_gradients_summed_in_bf16_stay_within_its_rounding() -> None:
    """fp32 jobs, in which nothing else is rounded: the norm moves by less than 2^-8, and more than not at all."""
    cases = [Case(1, 1, 2, stage, False, parallel="gradient_reduce_dtype: bf16") for stage in (1, 2, 3)]
    for case, errors in run_cases(cases).items():
        assert errors.loss < 1e-4 and 1e-6 < errors.grad_norm < 4e-3, (case, errors)


def test_make_parity_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the recipe says, on one layout, whose cases have been trained for the tests above."""
    # Inside `make test` a make announces its folder, unless told not to.
    ask = ["make", "--no-print-directory", "--dry-run", "parity", "ARGS=--layout 1x1x2"]
    root = Path(__file__).resolve().parents[2]
    recipe = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    settings, _, arguments = recipe.partition(" .venv/bin/python -m tests.distributed.parity ")
    assert settings == "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1"
    monkeypatch.setattr("sys.argv", ["parity.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    assert ended.value.code == 0
    heading, *rows, last = capsys.readouterr().out.splitlines()
    cases = [case for case in all_cases() if case.layout == (1, 1, 2)]
    assert all(row.startswith(f"{case} ") for case, row in zip(cases, rows, strict=True))
    worst = max(errors.largest for errors in errors_of_layout((1, 1, 2)).values())
    assert heading.endswith("(tolerance 1e-05)") and last == f"largest error {worst:.1e}"


def test_the_table_fails_where_a_case_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {Case(1, 1, 2, 3, False): Errors(0.0, 2 * TOLERANCE, 0.0, "")}
    monkeypatch.setattr(parity, "errors_of_layout", lambda layout: wrong)
    monkeypatch.setattr("sys.argv", ["parity.py", "--layout", "1x1x2"])
    with pytest.raises(SystemExit) as ended:
        parity.main()
    assert ended.value.code == 1 and "largest error 2.0e-05" in capsys.readouterr().out
