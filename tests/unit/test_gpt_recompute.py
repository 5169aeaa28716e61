"""What a GPT keeps and what it computes again: no bit of a gradient depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.kernels.operator import attention_op
from model.recompute import Recompute
from tests.unit.gpt_cases import CASES, batch, build, config_of, relative_error


@pytest.mark.parametrize("policy", ["selective", "attention", "full"])
@pytest.mark.parametrize("case", ["gqa", "tied", "documents, window", "all at once"])
def test_activation_checkpointing_computes_again_what_it_says_and_changes_no_bit(case: str, policy: Recompute) -> None:
    changes, packed = CASES[case]
    config, inputs = config_of(**changes), batch(packed)
    counts = {}
    models = {name: build(config, recompute=name) for name in ("none", policy)}
    for name, model in models.items():
        with Calls() as calls:
            model(**inputs)[0].backward()
        counts[name] = calls.counts
    layers, plain, again = config.num_hidden_layers, counts["none"], counts[policy]
    assert plain["attention"] == layers and again["attention"] == layers * (2 if policy == "full" else 1)
    assert again["silu"] == 2 * plain["silu"] == 2 * layers
    if policy == "selective":
        assert again["products"] == plain["products"]
    else:
        assert again["products"] > plain["products"]
    for (name, one), other in zip(models["none"].named_parameters(), models[policy].parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name


class Calls(TorchDispatchMode):
    """How often attention, the activation and matrix products are really computed in a forward and backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("attention", "silu", "products"), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        names = {attention_op: "attention", aten.silu.default: "silu", aten.mm.default: "products"}
        if func in names:
            self.counts[names[func]] += 1
        return func(*args, **(kwargs or {}))


class Widest(TorchDispatchMode):
    """The most rows of any tensor that is as wide as a feed-forward layer's inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.width,):
                self.rows = max(self.rows, tensor.numel() // self.width)
        return result


@pytest.mark.parametrize("tile", [1, 5, 12, 23])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_feed_forward_layer_in_tiles_has_the_same_gradients(tile: int, checkpointing: bool) -> None:
    """24 tokens: tiles that cross rows, that do not divide them, and that leave one token over."""
    config, inputs = config_of(intermediate_size=56), batch(packed=True)
    plain, tiled = build(config), build(config, recompute="full" if checkpointing else "none", mlp_tile_tokens=tile)
    expected, _ = plain(**inputs)
    expected.backward()
    with Widest(56) as widest:
        loss, _ = tiled(**inputs)
        loss.backward()
    assert widest.rows == max(tile, config.hidden_size), "a tile, or the down projection's weight"
    assert relative_error(loss, expected) < 1e-14
    for (name, one), other in zip(plain.named_parameters(), tiled.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and relative_error(other.grad, one.grad) < 1e-12, name


def test_evaluation_does_not_recompute() -> None:
    model = build(config_of(), recompute="full")
    calls: list[int] = []
    model.get_submodule("layers.0.attention").register_forward_pre_hook(lambda *_: calls.append(1))
    for training, expected in ((True, 2), (False, 1)):
        calls.clear()
        model.train(training)(**batch(packed=False))[0].backward()
        assert len(calls) == expected
