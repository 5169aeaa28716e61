"""What one forward and backward of context-parallel attention costs the host, without a GPU: at a few thousand tokens a
rank the host sets the pace.

    python benchmarks/host_time.py [--repetitions 2000] [--profile 25]

Rank 0 of two runs the real operators, plans, transport and adapter of flash-attn 4 on small CPU tensors. Stand-ins take
the place of what needs a GPU, and count: streams and events, the driver, Triton's launches, copies by copy engine, and
the kernels, which compute nothing. So the times are those of our Python and of torch's dispatcher, on this processor;
what flash-attn, Triton, CUDA and its driver add is left out, but for how often they are called.

A row is the fastest of many rounds, in microseconds of a forward and a backward, and the number of calls of each kind.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import timeit
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model.kernels import AttentionOperator, Documents, KernelOperator
from model.kernels.flash_attn_4 import FlashAttn4Kernel
from parallel import fused, peer_memory, transport, ulysses
from parallel.exchange import ExchangeAttention
from parallel.peer_flags import Batch
from parallel.transport import SymmetricTransport
from parallel.ulysses import UlyssesAttention

LOCAL_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 64, 8, 4, 8
ROUND = 50
"""Repetitions between two looks at the clock."""
DOCUMENTS = [0, 22, 32, 76, 102, 128]
KINDS = ("operators", "tensor ops", "streams and events", "driver calls", "launches", "kernels")

counted: Counter[str] = Counter()


def counting(kind: str, result: Any = None) -> Callable[..., Any]:
    """A function that is counted and returns `result`."""

    def stand_in(*_: Any, **__: Any) -> Any:
        counted[kind] += 1
        return result

    return stand_in


class Stream:
    cuda_stream = 1
    record_event = counting("streams and events", "an event")
    wait_event = wait_stream = counting("streams and events")


@contextmanager
def current(stream: Stream) -> Any:
    counted["streams and events"] += 2
    yield


def _flash_attn_fwd(q: Tensor, *_: Any, out: Tensor | None, cu_seqlens_q: Tensor | None = None, **__: Any) -> Any:
    counted["kernels"] += 1
    lse_shape = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q) if out is None else out, q.new_empty(lse_shape, dtype=torch.float32)


def _flash_attn_bwd(q: Tensor, k: Tensor, v: Tensor, *_: Any, dq: Any, dk: Any, dv: Any, **__: Any) -> Any:
    counted["kernels"] += 1
    return tuple(torch.empty_like(x) if into is None else into for x, into in ((q, dq), (k, dk), (v, dv)))


_flash_attn_bwd.compile_cache = None  # type: ignore[attr-defined]
PACKAGE: Any = ModuleType("flash_attn.cute.interface")
PACKAGE._flash_attn_fwd, PACKAGE._flash_attn_bwd, PACKAGE.get_jit_cache = _flash_attn_fwd, _flash_attn_bwd, repr
HOPPER = SimpleNamespace(SingleTileScheduler=None, SingleTileLPTBwdScheduler=None)


class Kernel(FlashAttn4Kernel):
    """The adapter, over a package that returns what it is given to write to."""

    capabilities = replace(FlashAttn4Kernel.capabilities, device_types=("cpu",))

    @staticmethod
    def load() -> tuple[Any, str]:  # type: ignore[override]
        return PACKAGE, ""


def count(run: Callable[[], None]) -> None:
    """Fills `counted` by one `run`."""
    counted.clear()
    with torch.autograd.profiler.profile() as profile:
        run()
    for event in profile.function_events:
        if event.name.startswith("ringzero::"):
            counted["operators"] += 1
        elif event.name.startswith("aten::") and not (event.cpu_parent and event.cpu_parent.name.startswith("aten::")):
            counted["tensor ops"] += 1  # as we call them, not what they are made of


def launching() -> ModuleType:
    """`parallel.fused_triton` over a Triton that launches nothing."""

    class Launched:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return counting("launches")

    def jit(function: Any = None, **_: Any) -> Any:
        return Launched() if function else lambda function: Launched()

    triton: Any = ModuleType("triton")
    triton.language = ModuleType("triton.language")
    triton.language.constexpr, triton.jit = int, jit
    triton.cdiv, triton.next_power_of_2 = lambda a, b: -(-a // b), lambda n: n
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": triton.language}):
        from parallel import fused_triton
    return fused_triton


def stand_ins() -> ExitStack:
    """Puts all of them in place."""
    stream, places = Stream(), ExitStack()
    cuda = SimpleNamespace(
        Stream=lambda device, priority: Stream(),
        current_stream=counting("streams and events", stream),
        stream=current,
        is_current_stream_capturing=lambda: False,
        synchronize=lambda device: None,
        empty_cache=lambda: None,
    )
    handle = SimpleNamespace(
        signal_pad_ptrs=[0, 10**6], get_buffer=lambda owner, shape, dtype, start: torch.zeros(shape, dtype=dtype)
    )
    symmetric = SimpleNamespace(empty=lambda *_, **__: None, rendezvous=lambda *_: handle)
    triton = launching()
    places.enter_context(mock.patch.dict(sys.modules, {"flash_attn.cute.flash_bwd_sm90": HOPPER}))
    for module, name, stand_in in (
        (transport, "torch", SimpleNamespace(cuda=cuda, empty=torch.empty, uint8=torch.uint8)),
        (transport, "dist", SimpleNamespace(get_rank=lambda group: 0, barrier=lambda group: None)),
        (peer_memory, "symmetric_memory", symmetric),
        (peer_memory, "torch", SimpleNamespace(cuda=cuda, uint8=torch.uint8)),
        (Batch, "issue", counting("driver calls")),
        (fused, "_kernels", lambda *_: triton),
        (ulysses, "copy_rows", counting("launches")),
    ):
        places.enter_context(mock.patch.object(module, name, stand_in))
    return places


def cases() -> dict[str, tuple[AttentionOperator, Documents | None]]:
    group: Any = SimpleNamespace(size=lambda: 2)

    def over() -> SymmetricTransport:
        return SymmetricTransport(group, torch.device("cpu"))

    def exchange(**options: Any) -> ExchangeAttention:
        return ExchangeAttention(over(), kernel, scale=0.1, balanced=True, **options)

    def heads(groups: int) -> UlyssesAttention:
        return UlyssesAttention(over(), KernelOperator(kernel, scale=0.1), head_groups=groups)

    kernel, documents = Kernel(), Documents.from_boundaries(DOCUMENTS, "cpu")
    return {
        "one GPU": (KernelOperator(kernel, scale=0.1), None),
        "one GPU, documents": (KernelOperator(kernel, scale=0.1), documents),
        "exchange, one call": (exchange(joined=True), None),
        "exchange, two calls": (exchange(joined=False), None),
        "exchange, documents": (exchange(joined=False), documents),
        "heads, 1 group": (heads(1), None),
        "heads, 2 groups": (heads(2), None),
        "heads, 2 groups, documents": (heads(2), documents),
    }


def step(attend: AttentionOperator, documents: Documents | None) -> Callable[[], None]:
    """A forward and a backward. On one GPU it has the tokens of one rank, packed as they are there."""
    alone, shape = isinstance(attend, KernelOperator), (1, LOCAL_TOKENS, HEADS, HEAD_DIM)
    if alone and documents is not None:
        documents = Documents.from_boundaries([bound // 2 for bound in documents.boundaries], "cpu")
    q = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, LOCAL_TOKENS, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    dout = torch.randn(shape, dtype=torch.bfloat16)

    def run() -> None:
        torch.autograd.grad(attend(q, k, v, documents), (q, k, v), dout)

    return run


def microseconds(run: Callable[[], None], repetitions: int) -> float:
    return 1e6 * min(timeit.repeat(run, number=ROUND, repeat=repetitions // ROUND)) / ROUND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--profile", type=int, default=0, help="print so many functions of each case, by own time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)
    print(f"{'':28}{'us':>8}" + "".join(f"{kind:>20}" for kind in KINDS))
    with stand_ins():
        for name, (attend, documents) in cases().items():
            run = step(attend, documents)
            for _ in range(20):
                run()
            count(run)
            calls = "".join(f"{counted[kind]:>20}" for kind in KINDS)
            print(f"{name:28}{microseconds(run, arguments.repetitions):8.0f}{calls}", flush=True)
            if arguments.profile:
                with cProfile.Profile() as profile:
                    for _ in range(arguments.repetitions):
                        run()
                pstats.Stats(profile).sort_stats("tottime").print_stats(arguments.profile)


if __name__ == "__main__":
    main()
