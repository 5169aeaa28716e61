"""The chunked head against torch's own linear and cross_entropy, gradients included, and what it never allocates.

Shapes: N tokens, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.head import Head
from model.kernels import linear_cross_entropy as kernel
from model.kernels.linear_cross_entropy import chunk_tokens, linear_cross_entropy

E, V = 12, 31
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens, the least."""
    monkeypatch.setattr(kernel, "_CHUNK_LOGITS", 1)


def inputs(tokens: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, E], weight [V, E], labels [N] with every fifth ignored."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, E, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (tokens,), generator=generator)
    labels[2::5] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients by torch in fp64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    loss = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    (upstream * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def error(result: Tensor | None, expected: Tensor) -> float:
    assert result is not None and result.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [1, 128, 129, 300])
def test_loss_and_gradients(tokens: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(tokens, dtype)
    loss = linear_cross_entropy(hidden, weight, labels)
    (0.37 * loss).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    for result, expected in zip(
        (loss.detach(), hidden.grad, weight.grad), dense(hidden, weight, labels, 0.37), strict=True
    ):
        assert error(result, expected) < TOLERANCES[dtype]


def test_gradients_of_many_chunks_add_up_in_fp32() -> None:
    """Forty chunks of a bf16 model: sums in bf16 would be wrong by 1.1e-2."""
    hidden, weight, labels = inputs(5120, torch.bfloat16)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert error(weight.grad, dense(hidden, weight, labels, 1.0)[2]) < 6e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_of_any_size(dtype: torch.dtype) -> None:
    """At 1e4 a softmax that does not subtract its maximum overflows."""
    hidden, weight, labels = inputs(300, dtype, scale=1e4)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    for result, expected in zip(
        (loss.detach(), hidden.grad, weight.grad), dense(hidden, weight, labels, 1.0), strict=True
    ):
        assert error(result, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("tokens", [0, 200])
def test_no_label_at_all(tokens: int) -> None:
    hidden, weight, labels = inputs(tokens, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_twice_backward_gives_twice_the_gradient() -> None:
    """What the forward pass leaves is not consumed, nor are the inputs overwritten."""
    hidden, weight, labels = inputs(200, torch.float64)
    before = hidden.detach().clone(), weight.detach().clone()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    _, expected_hidden, expected_weight = dense(hidden, weight, labels, 3.0)
    assert error(hidden.grad, expected_hidden) < 1e-12 and error(weight.grad, expected_weight) < 1e-12
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted(frozen: str) -> None:
    hidden, weight, labels = inputs(200, torch.float64)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    _, expected_hidden, expected_weight = dense(hidden, weight, labels, 1.0)
    if frozen == "hidden":
        assert hidden.grad is None and error(weight.grad, expected_weight) < 1e-12
    else:
        assert weight.grad is None and error(hidden.grad, expected_hidden) < 1e-12


def test_autocast_rounds_the_products_and_keeps_the_gradients_dtypes() -> None:
    hidden, weight, labels = inputs(300, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    exact = dense(hidden, weight, labels, 1.0)
    for result, expected in zip((loss.detach(), hidden.grad, weight.grad), exact, strict=True):
        assert result is not None and result.dtype == torch.float32
        assert 1e-6 < error(result, expected) < TOLERANCES[torch.bfloat16], "bf16 was used, and only for products"
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(loss, rounded), "the same products as in a bf16 model"


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, and the products made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


def test_the_logits_never_exist_whole() -> None:
    tokens, chunk = 1024, 128
    head = Head(E, V)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, tokens // 2, E, requires_grad=True)
    labels = torch.randint(V, (2, tokens // 2))
    with Largest() as ours:
        loss, _ = head(hidden, labels)
        loss.backward()
    with Largest() as evaluation, torch.no_grad():
        head(hidden, labels)
    with Largest() as torchs:
        functional.cross_entropy(functional.linear(hidden, head.weight).flatten(0, 1), labels.flatten())
    assert torchs.elements >= tokens * V, "the measure sees whole logits"
    assert ours.elements == tokens * E and chunk * V < tokens * E
    assert ours.products == 3 * tokens // chunk, "one product forward and two for the gradients, none twice"
    assert evaluation.products == tokens // chunk


def test_chunks_follow_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunk_tokens(128_256) == 2048 and chunk_tokens(128_256 // 8) == 16_640
    for vocabulary in (256, 32_000, 128_256, 262_144):
        assert chunk_tokens(vocabulary) % 128 == 0 and chunk_tokens(vocabulary) * vocabulary <= 1 << 28
        for tokens in (1, 4096, 8192, 100_000):
            chunks = list(kernel._chunks(tokens, vocabulary))
            assert chunks[0].start == 0 and chunks[-1].stop >= tokens > chunks[-1].start
            assert all(part.stop - part.start <= chunk_tokens(vocabulary) for part in chunks)
            assert len(chunks) == math.ceil(tokens / chunk_tokens(vocabulary))


def test_the_softmax_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break in a pass over the logits: on a GPU each becomes one kernel or two."""
    compiled = [torch.compile(one, fullgraph=True, backend="aot_eager") for one in kernel._PLAIN]
    monkeypatch.setattr(kernel, "_compiled", lambda: kernel._Softmax(*compiled))
    results = []
    for fused in (False, True):
        hidden, weight, labels = inputs(128, torch.float32)
        loss = kernel.linear_cross_entropy(hidden, weight, labels, compiled=fused)
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    for plain, fused_result in zip(*results, strict=True):
        assert torch.equal(plain, fused_result)
