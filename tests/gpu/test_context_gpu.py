"""Ways of context parallelism on two and four ranks, in bf16: their error against fp32 is that of one kernel call over
the whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels import KERNELS, AttentionOperator, Documents, KernelOperator
from parallel.cuda_graphs import RecordedAttention
from parallel.exchange import ExchangeAttention
from parallel.ring import RingAttention
from parallel.sequence import balanced_parts, causal_parts, zigzag_parts
from parallel.transport import MessageTransport, SymmetricTransport, make_transport
from parallel.ulysses import UlyssesAttention
from tests.distributed.harness import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
S, H, K, D = 4096, 32, 8, 128
MASKS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "causal": ((), None),
    "documents": ((0, 100, 1000, 1700, S), None),
    "window": ((), 700),
}
TOLERANCE = 1.42
"""Times the error of the same kernel on one GPU. One call rounds its result once. Of several, each rounds its part of
it, and their sum is rounded: twice the square of the error, so the root of 2, if nothing else erred. Sums over four
ranks in bf16 would err 1.6 times as much."""


def operators(backend: str, window: int | None) -> dict[str, AttentionOperator]:
    group, kernel = dist.group.WORLD, KERNELS[backend]
    device = torch.device("cuda", torch.cuda.current_device())
    settings = {"scale": D**-0.5, "window": window}
    whole = KernelOperator(kernel, **settings)
    memory, other = make_transport(group, device), make_transport(group, device)
    messages = MessageTransport(group)
    found: dict[str, AttentionOperator] = {
        **{
            f"heads, {groups} group(s)": UlyssesAttention(memory, whole, head_groups=groups)
            for groups in (1, 2, 4)
            if groups <= K // group.size()
        },
        "heads by messages": UlyssesAttention(messages, whole, head_groups=2),
        "exchange": ExchangeAttention(memory, kernel, **settings),
        "exchange, fetched again": ExchangeAttention(memory, kernel, keep_gathered=False, **settings),
        "exchange, one call": ExchangeAttention(memory, kernel, joined=True, **settings),
        "exchange, two calls": ExchangeAttention(memory, kernel, joined=False, **settings),
        "exchange, balanced cut": ExchangeAttention(memory, kernel, balanced=True, **settings),
        "exchange by messages": ExchangeAttention(messages, kernel, **settings),
        "ring": RingAttention(group, kernel, **settings),
    }
    if isinstance(memory, SymmetricTransport):
        by_keys = ExchangeAttention(other, kernel, **settings)
        found["exchange in CUDA graphs"] = RecordedAttention(found["exchange"], by_keys)
    return found


def _errors(backend: str) -> dict[tuple[str, str, str], float]:
    """By mask, operator and tensor: the largest relative error (2-norm, of this rank's part) over repetitions, divided
    by that of one call over the whole sequence."""
    generator = torch.Generator("cuda").manual_seed(5)
    full = [
        torch.randn(1, S, heads, D, device="cuda", dtype=torch.bfloat16, generator=generator) for heads in (H, K, K, H)
    ]
    size, rank, found = dist.get_world_size(), dist.get_rank(), {}
    for mask, (boundaries, window) in MASKS.items():
        documents = Documents.from_boundaries(boundaries, "cuda") if boundaries else None
        settings = {"scale": D**-0.5, "window": window}
        reference = KernelOperator(KERNELS["math"], **settings)
        exact = _run(reference, [tensor.float() for tensor in full], documents)
        by_one_call = _run(KernelOperator(KERNELS[backend], **settings), full, documents)
        for name, operator in operators(backend, window).items():
            parts = zigzag_parts(S, size)
            if "balanced" in name:
                parts = balanced_parts(S, size, boundaries, window) if documents else causal_parts(S, size, H, window)
            mine = torch.cat([torch.arange(*piece) for piece in parts[rank]]).cuda()
            local, expected, one_call = ([tensor[:, mine] for tensor in of] for of in (full, exact, by_one_call))
            single = _relative(one_call, expected)
            errors = [_relative(_run(operator, local, documents), expected) for _ in range(3)]
            for tensor, alone, *others in zip(("out", "dq", "dk", "dv"), single, *errors, strict=True):
                found[mask, name, tensor] = max(others) / alone
    return found


def _relative(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [((one.float() - other).norm() / other.norm()).item() for one, other in zip(results, expected, strict=True)]


def _run(operator: AttentionOperator, tensors: list[Tensor], documents: Documents | None) -> list[Tensor]:
    """out, dq, dk, dv; a second layer runs in between."""
    q, k, v = (tensor.clone().requires_grad_() for tensor in tensors[:3])
    out = operator(q, k, v, documents)
    other_q, other_k, other_v = (tensor.detach().mul(0.5).requires_grad_() for tensor in (q, k, v))
    between = operator(other_q, other_k, other_v, documents)
    between.backward(tensors[3])
    out.backward(tensors[3])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn_2"])
def test_errs_as_one_call_over_the_whole_sequence(backend: str, ranks: int) -> None:
    missing = KERNELS[backend].availability()
    if missing:
        pytest.skip(f"{backend} {missing}")
    for found in run_distributed(_errors, ranks, backend, device_type="cuda"):
        for key, ratio in found.items():
            assert ratio < TOLERANCE, (key, ratio)
