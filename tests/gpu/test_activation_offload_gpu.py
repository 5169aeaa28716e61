"""Activations in host memory on a GPU: the same bits through real copies beside the kernels, the memory that is saved,
and a host that waits for nothing."""

from __future__ import annotations

import pytest
import torch

from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS
from model.recompute import Recompute
from model.rope import rotary_tables
from parallel.activation_offload import ActivationOffload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
LAYERS, S, E = 8, 4096, 1024
HIDDEN = S * E * 2
"""Bytes of a block's input, and of attention's output."""
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=E,
    intermediate_size=2048,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
)


class Blocks:
    """The blocks of a model, on one input."""

    def __init__(self, policy: Recompute, store: ActivationOffload | None, compiled: bool):
        torch.manual_seed(1)
        model = GPT(CONFIG, kernel_attention(KERNELS["math"], CONFIG), recompute=policy, store=store)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.model = model.to("cuda", torch.bfloat16)
        if compiled:
            self.model.compile_blocks()
        positions = torch.arange(S, device="cuda")[None]
        self.rotary = rotary_tables(positions, CONFIG, torch.bfloat16)
        self.inputs = torch.randn(1, S, E, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def forward(self) -> torch.Tensor:
        hidden: torch.Tensor = self.inputs * 1
        for layer in self.model.layers:
            hidden = layer(hidden, self.rotary, None)
        return hidden

    def gradients(self) -> list[torch.Tensor | None]:
        return [self.inputs.grad, *(parameter.grad for parameter in self.model.layers.parameters())]


@pytest.mark.parametrize(("policy", "compiled"), [("full", False), ("attention", False), ("attention", True)])
def test_the_same_bits_without_waiting(policy: Recompute, compiled: bool) -> None:
    found = []
    for store in (None, ActivationOffload(torch.device("cuda"))):
        blocks = Blocks(policy, store, compiled)
        blocks.forward().sum().backward()  # buffers are made, kernels compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                blocks.forward().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(blocks.gradients())
    for plain, parked in zip(*found, strict=True):
        assert plain is not None and parked is not None and torch.equal(plain, parked)


@pytest.mark.parametrize(("policy", "tensors"), [("full", 1), ("attention", 2)])
def test_two_blocks_are_on_the_device(policy: Recompute, tensors: int) -> None:
    """After a forward pass the last block's alone, log-sum-exp apart."""
    held = []
    for store in (None, ActivationOffload(torch.device("cuda"))):
        blocks = Blocks(policy, store, compiled=False)
        before = torch.cuda.memory_allocated()
        output = blocks.forward()
        held.append(torch.cuda.memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()
        output.sum().backward()
        del output, blocks  # else they are freed within the next count
    assert held[0] - held[1] == (LAYERS - 1) * tensors * HIDDEN
