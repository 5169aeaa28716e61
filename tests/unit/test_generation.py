"""Generation with a cache against computing everything again for every token, and sampling against its definition.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launch.inference.cache_room import CacheTooLarge, check_cache_fits
from launch.inference.generation import generate
from launch.inference.sampling import Sampling, choose
from model.attention import kernel_attention
from model.config import ModelConfig, RopeScaling
from model.gpt import GPT
from model.kernels import KERNELS
from model.kv_cache import KVCache, cache_bytes

V = 31
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [11, 8, 0, 30, 12], [6]]

CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "window": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window in one block": {"sliding_window": 4, "full_attention_layers": (1,)},
    "window past the end": {"sliding_window": 100},
    "qk_norm, biases, tied": {"qk_norm": True, "attention_bias": "all", "tie_word_embeddings": True},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_sequence_length=64)},
}


def build(**changes: Any) -> GPT:
    shape = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = ModelConfig(**(shape | heads | changes))
    model = GPT(config, kernel_attention(KERNELS["cpu"], config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.4 * noise)
    return model


class Watched:
    """A model, and the logits that it gave for the last tokens."""

    def __init__(self, model: GPT):
        self.model, self.logits, self.sizes = model, list[Tensor](), list[int]()

    def __call__(self, *arguments: Any) -> Tensor:
        self.sizes.append(arguments[0].shape[1])
        self.logits.append(self.model(*arguments))
        return self.logits[-1]


def write(model: GPT, prompts: list[list[int]], count: int, sampling: Sampling = GREEDY, **options: Any) -> Any:
    """(tokens, the watched model)."""
    watched = Watched(model)
    attend = kernel_attention(KERNELS["cpu"], model.config)
    return generate(watched, model, attend, prompts, count, sampling, device=CPU, **options), watched


@torch.no_grad()
def recomputed(model: GPT, prompt: list[int], count: int, window: int | None = None) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and their logits [V], the whole sequence again for each."""
    if window is not None:
        config = model.config.model_copy(update={"sliding_window": window})
        for layer in model.layers:
            [layer.attention.attend, _] = kernel_attention(KERNELS["math"], config)
    tokens, logits = list(prompt), []
    for _ in range(count):
        logits.append(model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_cached_generation_is_full_recomputation(case: str, multiple_of: int) -> None:
    model = build(**CASES[case])
    attention = model.layers[0].attention.attend
    written, watched = write(model, PROMPTS, 12, multiple_of=multiple_of)
    assert watched.sizes == [-(-9 // multiple_of) * multiple_of, *[multiple_of] * 11], "one pass each, of one token"
    assert model.layers[0].attention.attend is attention, "the model has its attention back"
    for row, prompt in enumerate(PROMPTS):
        tokens, logits = recomputed(model, prompt, 12)
        assert written[row] == tokens, f"prompt {row}"
        for step, expected in enumerate(logits):
            torch.testing.assert_close(watched.logits[step][row, -1], expected, rtol=1e-4, atol=1e-4)
    assert len({tuple(tokens) for tokens in written}) == len(PROMPTS), "prompts matter"


def test_a_batch_writes_what_each_prompt_writes_alone() -> None:
    model = build()
    together, _ = write(model, PROMPTS, 10, Sampling(temperature=1.5, top_k=9, top_p=0.9, seed=40))
    for row, prompt in enumerate(PROMPTS):
        alone, _ = write(model, [prompt], 10, Sampling(temperature=1.5, top_k=9, top_p=0.9, seed=40 + row))
        assert together[row] == alone[0], f"prompt {row}"


def test_a_context_may_be_bounded_beyond_the_model() -> None:
    written, watched = write(build(), [[5, 9, 2, 6]], 12, window=5)
    tokens, logits = recomputed(build(), [5, 9, 2, 6], 12, window=5)
    assert written == [tokens]
    torch.testing.assert_close(watched.logits[-1][0, -1], logits[-1], rtol=1e-4, atol=1e-4)
    assert tokens != recomputed(build(), [5, 9, 2, 6], 12)[0], "the bound is felt"


def test_a_sequence_ends_where_it_is_told_to() -> None:
    model = build()
    (free, other), _ = write(model, PROMPTS[:2], 10)
    (cut, still), watched = write(model, PROMPTS[:2], 10, finished=lambda row, tokens: row == 0 and len(tokens) == 3)
    assert cut == free[:3] and still == other, "the others go on"
    (first, second), watched = write(model, PROMPTS[:2], 10, finished=lambda row, tokens: tokens[-1] >= 0)
    assert (first, second) == (free[:1], other[:1]) and len(watched.sizes) == 1, "nothing is computed for nobody"


def test_the_cache_has_the_size_of_the_key_heads() -> None:
    model = build(num_key_value_heads=1)
    cache = KVCache([3], 20, kernel_attention(KERNELS["cpu"], model.config), scale=1.0, window=None, device=CPU)
    with torch.no_grad(), cache.serving(model):
        served = model.layers[1].attention.attend
        logits = model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None])
        assert logits.shape == (1, 1, V), "logits of the last token only"
        assert served.keys.shape == served.values.shape == (1, 20, 1, 8)
        place = served.keys.data_ptr()
        for position in range(3, 20):
            assert cache.position_ids.tolist() == [[position]]
            model(torch.tensor([[0]]), cache.position_ids)
            cache.advance()
        assert served.keys.data_ptr() == place, "preallocated"
        with pytest.raises(AssertionError):
            model(torch.tensor([[0]]), cache.position_ids)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_the_buffers_take(case: str) -> None:
    model = build(**CASES[case])
    cache = KVCache([3, 1], 20, kernel_attention(KERNELS["cpu"], model.config), scale=1.0, window=None, device=CPU)
    with torch.no_grad(), cache.serving(model):
        model(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.arange(3).expand(2, 3))
        held = [layer.attention.attend for layer in model.layers]
    heads = model.config.num_key_value_heads
    assert cache_bytes(model.config, 2, 20, heads, torch.float32) == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in held
    )


def test_what_does_not_fit_is_said_before_it_is_made() -> None:
    """2 layers x 2 x 4 prompts x 1 head of two ranks' 2 x 8 numbers of 2 bytes: 256 for each token."""

    def check(max_tokens: int, prompts: list[list[int]] = PROMPTS, free: int = 2**30) -> None:
        config, dtype = build().config, torch.bfloat16
        check_cache_fits(
            config, prompts, max_tokens, asked="--max_tokens", tensor_parallel_size=2, dtype=dtype, free=free
        )

    most = 2**30 // 256 - 9
    check(most)
    with pytest.raises(CacheTooLarge) as refused:
        check(2 * most)
    assert str(refused.value) == (
        "--max_tokens (8388590) and prompts of up to 9 tokens, 4 at a time, take 2.00 GiB of keys and values on each "
        "rank, where 1.00 GiB are free; 4194295 fit, and more with fewer prompts"
    )
    with pytest.raises(CacheTooLarge, match="4194295 fit"):
        check(most + 1)
    with pytest.raises(CacheTooLarge, match=r"1 at a time, take 59,604,644.78 GiB .* 1.00 GiB are free; 16777207 fit$"):
        check(10**15, PROMPTS[:1])
    with pytest.raises(CacheTooLarge, match="free; give shorter prompts, or fewer$"):
        check(1, free=2048)


# -- sampling ----------------------------------------------------------------------------------------------------------


def frequencies(logits: list[float], count: int = 20_000, **settings: Any) -> np.ndarray:
    """How often each token is drawn."""
    streams = [torch.Generator().manual_seed(3)] * count
    drawn = choose(torch.tensor([logits]).expand(count, -1), Sampling(**settings), streams)
    return np.bincount(drawn.numpy(), minlength=len(logits)) / count


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).tolist()


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"temperature": 1.0, "top_k": 2}, PROBABILITIES * [0, 1, 0, 1, 0]),
        ({"temperature": 1.0, "top_k": 99}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.69}, PROBABILITIES * [0, 1, 0, 1, 0]),
        ({"temperature": 1.0, "top_p": 0.71}, PROBABILITIES * [0, 1, 0, 1, 1]),
        ({"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0, 0]),
        # The three likeliest hold 0.85; of those, the two likeliest hold 0.82.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.81}, PROBABILITIES * [0, 1, 0, 1, 0]),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.5}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(settings: dict[str, Any], weights: Any) -> None:
    expected = np.asarray(weights) / np.sum(weights)
    drawn = frequencies(LOGITS, **settings)
    assert (drawn[expected == 0] == 0).all(), drawn
    # four standard deviations of 20,000 draws
    assert (np.abs(drawn - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000)).all(), (drawn, expected)


def test_the_seed_decides_and_the_row_has_its_own() -> None:
    logits = torch.zeros(3, 50)

    def draw(seed: int) -> list[list[int]]:
        sampling = Sampling(seed=seed)
        streams = sampling.streams(3)
        return torch.stack([choose(logits, sampling, streams) for _ in range(20)], dim=1).tolist()

    first, again, next_seed = draw(5), draw(5), draw(6)
    assert first == again and first[1:] == next_seed[:2] and first[0] != first[1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\) must be 0 or more"),
        ({"top_k": -1}, r"top_k \(-1\) must be 0 or more"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p \(1.1\)"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Sampling(**settings)
