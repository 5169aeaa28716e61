"""The GPT against a second one written from the papers: loss, logits and every gradient in fp64.

Shapes: B batch, S sequence, E hidden_size, V vocabulary, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import cmath
import fnmatch
import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention import Attention, KernelAttention
from model.config import ModelConfig, RopeScaling
from model.gpt import GPT
from model.head import Head
from model.kernels import KERNELS, Documents
from model.kernels.operator import attention_op
from model.layers import FeedForward, RMSNorm
from model.recompute import Recompute
from model.rope import rotary_tables

B, S = 2, 12
DOCUMENT_LENGTHS = (1, 7, 4, 5, 1, 1, 5)  # two rows of 12

LLAMA_3 = RopeScaling(factor=8.0, original_sequence_length=8192)


def config_of(**changes: Any) -> ModelConfig:
    values = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return ModelConfig(**(values | changes))


def build(config: ModelConfig, kernel: str = "math", dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    """A GPT whose weights, norms included, are far from any special value."""
    model = GPT(config, KernelAttention(KERNELS[kernel], config), **options).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.3 * noise)
    return model


def batch(packed: bool, vocab_size: int = 31) -> dict[str, Any]:
    """Inputs of `GPT.forward`; packed documents restart their positions. A few labels carry no loss."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(vocab_size, (B, S), generator=generator)
    labels = torch.randint(vocab_size, (B, S), generator=generator)
    labels[0, 3], labels[1, -1] = -100, -100
    lengths = DOCUMENT_LENGTHS if packed else (S,) * B
    positions = torch.tensor([position for length in lengths for position in range(length)]).view(B, S)
    documents = Documents.from_boundaries([0, *accumulate(lengths)], "cpu") if packed else None
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels, "documents": documents}


# -- the second GPT: no torch.nn, no shared code; repeated heads, complex rotations, an explicit softmax ---------------


def plain_frequencies(config: ModelConfig) -> list[float]:
    """Radians a position of each rotated pair: RoFormer (3.2.2), and the published code of each scaling."""
    frequencies = [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return [frequency / scaling.factor for frequency in frequencies]
    if scaling.kind == "yarn":
        return plain_yarn(config, scaling)
    scaled = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_sequence_length / scaling.high_frequency_factor:
            scaled.append(frequency)
        elif wavelength > scaling.original_sequence_length / scaling.low_frequency_factor:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_sequence_length / wavelength - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return scaled


def plain_yarn(config: ModelConfig, scaling: RopeScaling) -> list[float]:
    """`YaRNScaledRotaryEmbedding` of the paper's repository."""

    def correction(rotations: float) -> float:
        span = math.log(scaling.original_sequence_length / (rotations * 2 * math.pi))
        return config.head_dim * span / (2 * math.log(config.rope_theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), config.head_dim - 1)
    scaled = []
    for pair in range(config.head_dim // 2):
        inverse = 1 / config.rope_theta ** (2 * pair / config.head_dim)
        mask = 1 - min(1.0, max(0.0, (pair - low) / (high - low)))
        scaled.append(inverse / scaling.factor * (1 - mask) + inverse * mask)
    return scaled


def plain_rotate(heads: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """[B, S, H, D]: dims d and d + D/2 are one complex number, turned by position x frequency."""
    turns = [[[cmath.exp(1j * p * f) for f in plain_frequencies(config)] for p in row] for row in positions.tolist()]
    pairs = torch.complex(*heads.chunk(2, dim=-1)) * torch.tensor(turns, dtype=torch.complex128)[:, :, None]
    if config.rope_scaling is not None and config.rope_scaling.kind == "yarn":
        pairs = pairs * (config.rope_scaling.attention_factor or 0.1 * math.log(config.rope_scaling.factor) + 1)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def plain_linear(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def plain_visible(config: ModelConfig, lengths: tuple[int, ...]) -> Tensor:
    """[B, S, S], True where the row's query sees the key."""
    visible = torch.zeros(B, S, S, dtype=torch.bool)
    for start, end in pairwise([0, *accumulate(lengths)]):
        for query in range(start, end):
            for key in range(start, query + 1):
                if config.sliding_window is None or query - key < config.sliding_window:
                    visible[query // S, query % S, key % S] = True
    return visible


def plain_logits(p: dict[str, Tensor], config: ModelConfig, inputs: dict[str, Any], packed: bool) -> Tensor:
    eps, width = config.rms_norm_eps, config.head_dim
    visible = plain_visible(config, DOCUMENT_LENGTHS if packed else (S,) * B)
    positions = inputs["position_ids"]
    x = p["embed_tokens.weight"][inputs["input_ids"]]
    for number in range(config.num_hidden_layers):
        w = {name.removeprefix(f"layers.{number}."): weight for name, weight in p.items()}
        y = plain_norm(x, w["attention_norm.weight"], eps)
        q, k, v = (plain_linear(y, w, f"attention.{c}_proj").view(B, S, -1, width) for c in "qkv")
        if config.qk_norm:
            q = plain_norm(q, w["attention.q_norm.weight"], eps)
            k = plain_norm(k, w["attention.k_norm.weight"], eps)
        q, k = plain_rotate(q, positions, config), plain_rotate(k, positions, config)
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = (torch.stack([heads] * group, dim=3).flatten(2, 3) for heads in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
        weights = torch.where(visible[:, None], scores.exp(), 0)
        weights = weights / weights.sum(-1, keepdim=True)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, S, -1)
        x = x + plain_linear(attended, w, "attention.o_proj")
        y = plain_norm(x, w["feed_forward_norm.weight"], eps)
        gate, up = y @ w["feed_forward.gate_proj.weight"].T, y @ w["feed_forward.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w["feed_forward.down_proj.weight"].T
    head = p["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return plain_norm(x, p["norm.weight"], eps) @ head.T


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != -100:
            total = total + row.exp().sum().log() - row[label]
    return total


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "gqa": ({}, False),
    "mha": ({"num_key_value_heads": 4}, False),
    "mqa": ({"num_key_value_heads": 1}, False),
    "qk_norm": ({"qk_norm": True}, False),
    "tied": ({"tie_word_embeddings": True}, False),
    "window": ({"sliding_window": 3}, False),
    "window of one": ({"sliding_window": 1}, False),
    "window past the sequence": ({"sliding_window": 40}, False),
    "documents": ({}, True),
    "documents, window": ({"sliding_window": 3}, True),
    "bias of queries, keys and values": ({"attention_bias": "qkv"}, False),
    "bias everywhere, QK-norm": ({"attention_bias": "all", "qk_norm": True}, False),
    "linear scaling": ({"rope_scaling": RopeScaling(kind="linear", factor=3.0)}, False),
    "yarn": (
        {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_sequence_length=256), "rope_theta": 900.0},
        False,
    ),
    "yarn, its factor given": (
        {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_sequence_length=256, attention_factor=1.3)},
        False,
    ),
    "rope scaling": ({"rope_scaling": RopeScaling(factor=4.0, original_sequence_length=16), "rope_theta": 90.0}, False),
    "all at once": (
        {
            "qk_norm": True,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "rope_theta": 70.0,
            "rope_scaling": RopeScaling(factor=2.0, original_sequence_length=20),
            "rms_norm_eps": 0.02,
            "num_key_value_heads": 1,
        },
        True,
    ),
}


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
    model = build(config_of(), recompute="full").eval()
    calls: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(**batch(packed=False))[0].backward()
    assert len(calls) == 1


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
        model = GPT(config, KernelAttention(KERNELS["math"], config))
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
        model = GPT(config, KernelAttention(KERNELS["math"], config))
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
