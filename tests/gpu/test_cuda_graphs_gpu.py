"""Attention recorded as CUDA graphs while another thread page-locks memory, as the one that loads batches does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from model.kernels import KERNELS, AttentionOperator, KernelOperator
from parallel.cuda_graphs import RecordedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYERS = 8


def gradients(attend: AttentionOperator, inputs: list[Tensor]) -> list[Tensor]:
    """Of layers that all wait for their backward pass, so that each holds a recording of its own."""
    q, k, v = leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    for _ in range(LAYERS):
        q = q + attend(q, k, v, None)
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
