"""The GPT against a second one written from the papers: loss, logits and every gradient; its numerics and its plan.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from torch import nn

from model.attention import Attention, kernel_attention
from model.gpt import GPT
from model.head import Head
from model.kernels import KERNELS
from model.layers import FeedForward, RMSNorm
from model.rope import rotary_tables
from tests.unit.gpt_cases import CASES, LLAMA_3, B, S, batch, build, config_of, relative_error
from tests.unit.plain_gpt import plain_frequencies, plain_logits, plain_loss


@pytest.mark.parametrize("kernel", ["math", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_one_in_the_papers(case: str, kernel: str) -> None:
    changes, packed = CASES[case]
    config = config_of(**changes)
    model, inputs = build(config, kernel), batch(packed)
    loss, count = model(**inputs)
    loss.backward()

    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits = plain_logits(weights, config, inputs, packed)
    expected = plain_loss(logits, inputs["labels"])
    expected.backward()

    assert count.item() == B * S - 2
    assert relative_error(loss, expected) < 1e-12
    with torch.no_grad():
        assert relative_error(model(**inputs | {"labels": None}), logits) < 1e-12
    for name, parameter in model.named_parameters():
        expected_gradient = weights[name].grad
        assert parameter.grad is not None and expected_gradient is not None, name
        if config.sliding_window == 1 and ("q_proj" in name or "k_proj" in name):
            assert parameter.grad.abs().max() < 1e-12, name  # one key: its weight is 1 whatever the score
        else:
            assert relative_error(parameter.grad, expected_gradient) < 1e-12, name


def test_llama_3_scaling_follows_the_published_formula() -> None:
    config = config_of(head_dim=128, rope_theta=500_000.0, rope_scaling=LLAMA_3)
    unscaled = plain_frequencies(config.model_copy(update={"rope_scaling": None}))
    expected = plain_frequencies(config)
    ratios = [a / b for a, b in zip(expected, unscaled, strict=True)]
    assert ratios.count(1.0) > 10 and ratios.count(1 / 8) > 10, "kept, stretched"
    assert sum(1 / 8 < ratio < 1 for ratio in ratios) > 3, "and interpolated frequencies all occur"
    cos, sin = rotary_tables(torch.ones(1, 1, dtype=torch.int64), config, torch.float64)
    torch.testing.assert_close(
        torch.atan2(sin, cos).flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_a_half_precision_model_keeps_its_positions_apart() -> None:
    # Rounded to bf16, positions 10001 and 10002 are one.
    config = config_of()
    position_ids = torch.tensor([[10_001, 10_002]])
    cos, sin = rotary_tables(position_ids, config, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16 and cos.shape == (1, 2, 1, config.head_dim // 2)
    exact_cos, exact_sin = rotary_tables(position_ids, config, torch.float64)
    assert (cos - exact_cos).abs().max() < 5e-3 and (sin - exact_sin).abs().max() < 5e-3


def test_the_loss_of_a_half_precision_model_is_summed_in_fp32() -> None:
    head = Head(24, 31).bfloat16()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.weight.copy_(torch.randn(31, 24, generator=generator))
    hidden = torch.randn(4, 500, 24, generator=generator, dtype=torch.bfloat16)
    labels = torch.randint(31, (4, 500), generator=generator)
    loss, count = head(hidden, labels)
    assert loss.dtype == torch.float32 and count.item() == 2000
    expected = plain_loss(head(hidden).double(), labels)
    assert relative_error(loss.double(), expected) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "attention_bias": "all"}, {"tie_word_embeddings": True}], ids=str
)
def test_the_tensor_parallel_plan_covers_the_model(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        config = config_of(**changes)
        model = GPT(config, kernel_attention(KERNELS["math"], config))
    plan, modules = GPT.tensor_parallel_plan, dict(model.named_modules())
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        hits = fnmatch.filter(modules, pattern)
        assert hits, f"{pattern} matches nothing"
        assert not styles.keys() & set(hits), f"{pattern} matches modules of another pattern"
        styles |= dict.fromkeys(hits, style)

    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Embedding | Head):
            assert name in styles, f"{name} would be left whole"
        if isinstance(module, Attention):  # its inputs are one region, its heads are split, its output is summed
            for child, style in {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}.items():
                assert styles[f"{name}.{child}"] == style
            assert styles[f"{name}_norm"] == "region_input" and styles[name] == "region_output"
            assert styles[f"{name}.q_norm"] == styles[f"{name}.k_norm"] == "partial_grad"
        if isinstance(module, FeedForward):
            for child, style in {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}.items():
                assert styles[f"{name}.{child}"] == style
            assert styles[f"{name}_norm"] == "region_input" and styles[name] == "region_output"
        if isinstance(module, Head):
            assert styles[name] == "vocab_head" and styles["norm"] == "region_input"
        if isinstance(module, nn.Embedding):
            assert styles[name] == "vocab_embedding"
        if isinstance(module, RMSNorm):  # each is in a region or at its entry
            assert styles[name] in ("region_input", "partial_grad")


@pytest.mark.parametrize("layers", [1, 8])
def test_initial_distribution(layers: int) -> None:
    with torch.device("meta"):
        config = config_of(num_hidden_layers=layers, qk_norm=True, attention_bias="all", initializer_range=0.05)
        model = GPT(config, kernel_attention(KERNELS["math"], config))
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert len(norms) == 4 * layers + 1
    for name, _ in model.named_parameters():
        mean, std = model.initial_distribution(name)
        if name in norms:
            assert (mean, std) == (1.0, 0.0), name
        elif name.endswith(".bias"):
            assert (mean, std) == (0.0, 0.0), name
        elif name.split(".")[-2] in ("o_proj", "down_proj"):  # GPT-2: 2 additions to the residual stream a layer
            assert (mean, std) == (0.0, pytest.approx(0.05 / (2 * layers) ** 0.5)), name
        else:
            assert (mean, std) == (0.0, 0.05), name
