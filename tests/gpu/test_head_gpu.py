"""The chunked head on a GPU: bf16 products added in fp32, against fp64, and the memory that it takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from launch.memory.formulas import estimate_activations
from model.config import ModelConfig
from model.head import Head
from model.kernels import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
TOKENS, HIDDEN, VOCABULARY = 2048, 512, 16_384


def inputs() -> tuple[Head, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = Head(HIDDEN, VOCABULARY).to("cuda", torch.bfloat16)
    torch.nn.init.normal_(head.weight, std=0.05)
    hidden = torch.randn(1, TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(VOCABULARY, (1, TOKENS), device="cuda")
    labels[0, ::7] = -100
    return head, hidden, labels


@pytest.mark.parametrize("chunk", [128, 512, 2048])
def test_loss_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are rounded to bf16 twice; the weight's error does not grow with the number of chunks."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", chunk * VOCABULARY)
    head, hidden, labels = inputs()
    loss, _ = head(hidden, labels)
    (loss / TOKENS).backward()
    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight))
    logits = (exact @ weight.T).flatten(0, 1)
    expected = functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    (expected / TOKENS).backward()
    assert abs(loss.item() / expected.item() - 1) < 1e-4
    for found, wanted in ((hidden.grad, exact.grad), (head.weight.grad, weight.grad)):
        assert found is not None and wanted is not None and found.dtype == torch.bfloat16
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < 6e-3


def test_it_takes_what_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", 512 * VOCABULARY)
    head, hidden, labels = inputs()
    head(hidden, labels)[0].backward()  # what cuBLAS allocates once is there
    head.weight.grad = hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(hidden, labels)[0].backward()
    estimate = estimate_activations(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
        tokens=TOKENS,
        tensor_parallel_size=1,
        sequence_parallel=False,
        context=[None],
        precision="bf16",
        autocast=False,
        recompute=["none"],
        compiled=False,
    ).head
    assert 0.95 * estimate <= torch.cuda.max_memory_allocated() - before <= 1.05 * estimate
