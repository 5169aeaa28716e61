"""Activations in host memory: the same bits, the buffers used again, and what is where at which moment."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS
from model.recompute import Recompute
from parallel.activation_offload import ActivationOffload

CPU, LAYERS, B, S, E = torch.device("cpu"), 5, 2, 32, 64
CONFIG = ModelConfig(
    vocab_size=131,
    hidden_size=E,
    intermediate_size=160,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)
HIDDEN = B * S * E * 4
"""Bytes of a block's input, and here of attention's output."""


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    """Buffers must come back by themselves: a cycle of references would hold them until the collector runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def build(policy: Recompute, store: ActivationOffload | None, **options: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(CONFIG, kernel_attention(KERNELS["cpu"], CONFIG), recompute=policy, store=store, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def loss_of(model: GPT, seed: int = 0) -> Tensor:
    ids = torch.randint(0, CONFIG.vocab_size, (B, S), generator=torch.Generator().manual_seed(seed))
    loss, _ = model(ids, torch.arange(S).expand(B, -1), ids)
    return loss


def parked(store: ActivationOffload) -> list[list[bool]]:
    """For each block of the last forward pass, from the last to the first: which of its tensors are on the device."""
    found, block = [], store._block
    while block is not None and block.alive():
        found.append([one.on_device is not None for one in block.alive()])
        block = block.before and block.before()
    return found


@pytest.mark.parametrize(
    ("policy", "compiled", "tile"),
    [("full", False, None), ("full", False, 16), ("attention", False, None), ("attention", True, None)],
)
def test_the_same_bits(policy: Recompute, compiled: bool, tile: int | None) -> None:
    """Two micro-batches; as many buffers as one needs, all free in the end."""
    gradients = []
    store = ActivationOffload(CPU)
    for used in (None, store):
        model = build(policy, used, mlp_tile_tokens=tile)
        if compiled:
            model.compile_blocks()
        losses = [loss_of(model, seed) for seed in (0,)]
        losses[0].backward()
        losses.append(loss_of(model, 1))
        losses[1].backward()
        gradients.append([*losses, *(parameter.grad for parameter in model.parameters())])
    for plain, found in zip(*gradients, strict=True):
        assert plain is not None and found is not None and torch.equal(plain, found)
    kept = LAYERS * (2 if policy == "attention" else 1)
    assert {size: len(buffers) for size, buffers in store._free.items()} == {HIDDEN: kept}


@pytest.mark.parametrize(("policy", "tensors"), [("full", 1), ("attention", 2)])
def test_what_is_on_the_device(policy: Recompute, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the forward pass the last block's; while a block is computed again its own and those of the one before."""
    store = ActivationOffload(CPU)
    model = build(policy, store)
    loss = loss_of(model)
    here, away = [True] * tensors, [False] * tensors
    assert parked(store) == [here] + [away] * (LAYERS - 1)
    seen = []

    def note(module: Any, inputs: Any) -> None:
        seen.append(parked(store))

    for layer in model.layers:
        layer.feed_forward.register_forward_pre_hook(note)  # type: ignore[union-attr]
    loss.backward()
    assert seen[0][:3] == [here, here, away], "the last block's, and the one before on its way"
    assert all(moment.count(here) <= 2 for moment in seen) and len(seen) == LAYERS
    assert parked(store) == []


def test_forgotten_activations_free_their_buffers() -> None:
    """A forward pass without a backward pass, and one without gradients."""
    store = ActivationOffload(CPU)
    model = build("full", store)
    loss = loss_of(model)
    assert not store._free[HIDDEN]
    del loss
    assert len(store._free[HIDDEN]) == LAYERS
    with torch.no_grad():
        loss_of(model)
    loss_of(model.eval())
    assert len(store._free[HIDDEN]) == LAYERS


def test_parameters_small_tensors_and_views_with_gaps_stay() -> None:
    store = ActivationOffload(CPU)
    hidden = torch.zeros(8, 8)
    with store.block(hidden):
        for tensor in (torch.nn.Parameter(torch.zeros(8, 8)), torch.zeros(15), torch.zeros(8, 8).t()):
            assert store.pack(tensor) is tensor
        assert store.unpack(store.pack(torch.eye(4))).equal(torch.eye(4))
    assert not any(len(buffers) != 1 for buffers in store._free.values())
