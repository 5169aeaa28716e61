"""Attention recorded as CUDA graphs: while another thread page-locks memory, as the one that loads batches does, and by
ranks whose allocators give other addresses."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels import KERNELS, AttentionOperator, KernelOperator
from parallel.cuda_graphs import RecordedAttention
from parallel.exchange import ExchangeAttention
from parallel.transport import SymmetricTransport, make_transport
from tests.distributed.harness import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYERS = 8


def gradients(attend: AttentionOperator, inputs: list[Tensor], full: bool = False) -> list[Tensor]:
    """Of layers that all wait for their backward pass, so that each holds a recording of its own, or that are computed
    again if `full`."""
    q, k, v = leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    def layer(q: Tensor) -> Tensor:
        return q + attend(q, k, v, None)

    for _ in range(LAYERS):
        q = checkpoint(layer, q, use_reentrant=False) if full else layer(q)
    return list(torch.autograd.grad(q.float().square().sum(), leaves))


def test_recording_beside_a_thread_that_page_locks() -> None:
    kernel = KERNELS["torch_flash"]
    missing = kernel.availability()
    if missing:
        pytest.skip(f"torch_flash {missing}")
    plain, other = (KernelOperator(kernel, scale=0.125, deterministic=True) for _ in range(2))
    recorded = RecordedAttention(plain, other)
    inputs = [torch.randn(1, 1024, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    done = threading.Event()

    def page_lock() -> int:
        held: list[Tensor] = []  # else torch would hand out again what is locked already
        while not done.is_set() and len(held) < 8192:
            held.append(torch.empty(2**16, dtype=torch.uint8).pin_memory())
        return len(held)

    with ThreadPoolExecutor(1) as thread:
        locking = thread.submit(page_lock)
        try:
            found = [gradients(recorded, inputs) for _ in range(2)]
        finally:
            done.set()
        assert locking.result() > 0
    for once in found:
        for one, expected in zip(once, gradients(plain, inputs), strict=True):
            assert torch.equal(one, expected)


def _errors() -> list[float]:
    """Of gradients by recordings to those without, relative; every rank holds other memory between its steps."""
    device, rank = torch.device("cuda", torch.cuda.current_device()), dist.get_rank()
    transports = [make_transport(dist.group.WORLD, device) for _ in range(2)]
    if not isinstance(transports[0], SymmetricTransport):
        return []
    plain, other = (ExchangeAttention(one, KERNELS["torch_flash"], scale=0.125) for one in transports)
    recorded = RecordedAttention(plain, other)
    inputs = [torch.randn(1, 1024, heads, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    errors, held = [], []
    for step in range(6):
        held.append([torch.empty(1 + 16384 * rank * part, device=device) for part in range(step)])
        found, expected = (gradients(attend, inputs, full=True) for attend in (recorded, plain))
        for one, two in zip(found, expected, strict=True):
            errors.append(((one - two).float().norm() / two.float().norm()).item())
        del held[-1][::2]
    return errors


def test_ranks_with_other_addresses_replay_the_same_recordings() -> None:
    missing = KERNELS["torch_flash"].availability()
    if missing:
        pytest.skip(f"torch_flash {missing}")
    for errors in run_distributed(_errors, 2, device_type="cuda", timeout=120):
        assert all(error < 1e-2 for error in errors), errors
