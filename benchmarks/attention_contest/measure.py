"""Times, memory, errors and the kernels' own time of the contestants on one row.

Shapes: S tokens of the whole sequence, L tokens of a contestant on this rank, H query and K key/value heads, D = 128.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attention_contest.contestants import Builder, Contestant, Stage
from attention_contest.reference import NAMES, sampled_attention
from attention_contest.rows import HEAD_DIM, ONE_GPU

ROUNDS = 5
SAMPLES = 128
"""Queries whose error is measured."""
ATTENTION_KERNEL = re.compile("flash|sdpa|flex_attention|fmha", re.IGNORECASE)
"""Names that GPU kernels of attention have, forward and backward, in all libraries that take part."""


Rounds = dict[str, list[float]]
"""Milliseconds of each round, forward and forward_backward."""


class Inputs:
    """q, k, v [1, S, heads, D] of the whole sequence, the same on every rank, and what the sampled queries give."""

    def __init__(self, stage: Stage):
        row, length = stage.row, stage.length
        self.stage = stage
        generator = torch.Generator(stage.device).manual_seed(17)

        def random(tokens: int, heads: int) -> Tensor:
            shape = 1, tokens, heads, HEAD_DIM
            return torch.randn(shape, device=stage.device, dtype=torch.bfloat16, generator=generator)

        self.full = random(length, row.heads), random(length, row.key_value_heads), random(length, row.key_value_heads)
        self.dense_gradient = random(length, row.heads)
        chosen = torch.randperm(length, generator=torch.Generator().manual_seed(17))
        self.samples = chosen[: min(SAMPLES, length)].sort().values
        self.sampled_gradient = torch.zeros_like(self.dense_gradient)
        at = self.samples.to(stage.device)
        self.sampled_gradient[:, at] = self.dense_gradient[:, at]
        q, k, v = (tensor[0] for tensor in self.full)
        self.expected = sampled_attention(
            q[at],
            k,
            v,
            self.dense_gradient[0, at],
            self.samples,
            scale=HEAD_DIM**-0.5,
            window=stage.window,
            boundaries=row.boundaries(stage.ranks),
        )

    def squared_errors(self, results: list[Tensor], positions: Tensor) -> Tensor:
        """[4, 2]: for out, dq, dk, dv of the tokens at `positions`, squares of the error and of what is expected."""
        rank_of = torch.full((self.stage.length,), -1)
        rank_of[positions] = torch.arange(len(positions))
        here = rank_of[self.samples]
        mine = (here >= 0).nonzero().flatten()
        queries, samples = here[mine].to(self.stage.device), mine.to(self.stage.device)
        keys = positions.to(self.stage.device)
        squares = []
        for number, (result, expected) in enumerate(zip(results, self.expected, strict=True)):
            found, wanted = (result[0, queries], expected[samples]) if number < 2 else (result[0], expected[keys])
            squares.append(torch.stack([(found.float() - wanted).square().sum(), wanted.square().sum()]))
        return torch.stack(squares).double()


class Measurement:
    """One contestant on its part of the inputs: checked and warmed up, then timed a round at a time."""

    def __init__(self, name: str, contestant: Contestant, inputs: Inputs):
        self.name, self.contestant, self.device = name, contestant, inputs.stage.device
        at = contestant.positions.to(self.device)
        self.q, self.k, self.v = (tensor[:, at].requires_grad_() for tensor in inputs.full)
        self.rounds: Rounds = {"forward": [], "forward_backward": []}
        self.gradient = inputs.sampled_gradient[:, at]
        with contestant.context():
            out = self.both()
        results = [out.detach(), self.q.grad, self.k.grad, self.v.grad]
        self.squares = inputs.squared_errors([result for result in results if result is not None], contestant.positions)
        del out, results
        self.gradient = inputs.dense_gradient[:, at]
        self.peak_gib, self.profiled = self._peak(), self._profiled()
        with contestant.context(), torch.no_grad():
            self.forward()

    def forward(self) -> Tensor:
        return self.contestant.attend(self.q, self.k, self.v)

    def both(self) -> Tensor:
        self.q.grad = self.k.grad = self.v.grad = None
        out = self.forward()
        with torch.autograd.set_multithreading_enabled(False):  # see `ring_attention.py`
            out.backward(self.gradient)
        return out

    def round(self, repetitions: int) -> None:
        """Adds one round's medians."""
        with self.contestant.context():
            with torch.no_grad():
                self.rounds["forward"].append(median_ms(self.forward, repetitions, self.device))
            self.rounds["forward_backward"].append(median_ms(self.both, repetitions, self.device))

    def result(self, ideal: Rounds) -> dict[str, Any]:
        """Milliseconds (median over the rounds) and GiB beyond the inputs, each of the slowest rank; relative errors.
        Shares are of the `ideal` times, this rank's of the rounds that came directly before this contestant's. What was
        profiled is of the rank whose kernels take longest: the others, on GPUs that are faster, wait for it."""
        times = {kind: _slowest(rounds, self.device) for kind, rounds in self.rounds.items()}
        ideals = {kind: _slowest(rounds, self.device) for kind, rounds in ideal.items()}
        pairs = {kind: zip(ideals[kind], times[kind], strict=True) for kind in times}
        ranks = dist.get_world_size()
        shares = {kind: statistics.median(one / ranks / own for one, own in both) for kind, both in pairs.items()}
        [peak_gib] = _slowest([self.peak_gib], self.device)
        dist.all_reduce(self.squares)
        profiled = [(0.0, 0.0)] * dist.get_world_size()
        dist.all_gather_object(profiled, self.profiled or (0.0, 0.0))
        kernels, exposed = max(profiled)
        errors = (self.squares[:, 0] / self.squares[:, 1]).sqrt().tolist()
        return {
            **{kind: statistics.median(rounds) for kind, rounds in times.items()},
            "shares": shares,
            "peak_gib": peak_gib,
            "kernels": None if self.profiled is None else kernels,
            "exposed": None if self.profiled is None else exposed,
            "errors": dict(zip(NAMES, errors, strict=True)),
        }

    def _peak(self) -> float:
        """GiB that forward and backward take at their highest; a transport's own memory is not counted."""
        if self.device.type != "cuda":
            return 0.0
        self.q.grad = self.k.grad = self.v.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with self.contestant.context():
            self.both()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def _profiled(self) -> tuple[float, float] | None:
        """Milliseconds of one forward + backward in which a kernel of attention runs on this GPU, and in which none
        does: both of the same repetitions, so that neither the GPU's clock nor the profiler comes between them."""
        if self.device.type != "cuda":
            return None
        dist.barrier()
        torch.cuda.synchronize()
        repetitions = 4
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            with self.contestant.context():
                for _ in range(repetitions):
                    self.both()
            torch.cuda.synchronize()
        events = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        found = attention_and_rest(events)
        return None if found is None else (found[0] / 1e3 / repetitions, found[1] / 1e3 / repetitions)


def _slowest(values: list[float], device: torch.device) -> list[float]:
    """Each of the rank where it is largest."""
    largest = torch.tensor(values, device=device, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def attention_and_rest(events: list[tuple[str, float, float]]) -> tuple[float, float] | None:
    """Of a GPU's activity (name, start, end), from its first to its last moment: the time with and the time without a
    kernel of attention; None where there is no such kernel."""
    spans = sorted((start, end) for name, start, end in events if ATTENTION_KERNEL.search(name))
    if not spans:
        return None
    attention = covered(spans)
    return attention, max(end for _, _, end in events) - min(start for _, start, _ in events) - attention


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, sorted by their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def median_ms(action: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Of repeated calls, all ranks starting together; the first is not counted."""
    dist.barrier()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(repetitions + 1):
            action()
            times.append(time.perf_counter())
        return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(times[1:]))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda.synchronize()
    for mark in marks:
        action()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(following) for one, following in itertools.pairwise(marks))


def measure_row(
    stage: Stage, builders: dict[str, Builder], ours: set[str], repetitions: int | None = None
) -> dict[str, Any]:
    """{name: result, or {"failed": why}} of all contestants on one shape. `repetitions` of a round: by the length of
    the work where not said.

    They take turns, and before each turn of the others one GPU takes one: the same kernels run up to 7 % faster or
    slower a second later, as the GPU's clock follows its power and temperature, so a ratio is taken of neighbours.
    """
    found: dict[str, Any] = {}
    running: list[Measurement] = []
    inputs = Inputs(stage)
    for name, build in builders.items():
        try:
            running.append(Measurement(name, build(), inputs))
        except Exception as error:  # one that fails, for want of memory too, must not cost the others their row
            found[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    repetitions = repetitions or max(2, min(20, 8 * 32 * 8192 // (stage.row.heads * stage.row.local_tokens)))
    [single] = (one for one in running if one.name == ONE_GPU)
    before: dict[str, Rounds] = {one.name: {kind: [] for kind in single.rounds} for one in running}
    for _ in range(ROUNDS):
        for one in running:
            single.round(repetitions)
            for kind, rounds in single.rounds.items():
                before[one.name][kind].append(rounds[-1])
            if one is not single:
                one.round(repetitions)
    for one in running:
        ideal = single.rounds if one is single else before[one.name]
        found[one.name] = one.result(ideal) | {"ours": one.name in ours}
    return found
