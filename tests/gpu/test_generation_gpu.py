"""Cached generation on a GPU, through the kernel that prompts are read with there, against full recomputation."""

from __future__ import annotations

import pytest
import torch

from launch.inference.generation import generate
from launch.inference.model import attention_on_one_device
from launch.inference.sampling import Sampling
from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PROMPTS = [list(range(1, 200)), [7], [3, 1, 4, 1, 5, 9, 2, 6]]


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 50])
# One bf16 rounding is 2^-8; logits of a few units pass through two blocks.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
def test_cached_logits_are_those_of_full_recomputation(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    device = torch.device("cuda")
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=window,
    )
    torch.manual_seed(3)
    with device:
        model = GPT(config, kernel_attention(KERNELS["math"], config)).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if name.endswith("norm.weight") else parameter.normal_(0, 0.06)
    seen = []

    def forward(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append(model(*arguments))
        return seen[-1]

    attend = attention_on_one_device(config, device, dtype)
    written = generate(forward, model, attend, PROMPTS, 8, Sampling(temperature=0), device=device)
    for row, prompt in enumerate(PROMPTS):
        whole = torch.tensor([prompt + written[row]], device=device)
        logits = model(whole, torch.arange(whole.shape[1], device=device)[None])[0, len(prompt) - 1 : -1]
        cached = torch.stack([step[row, -1] for step in seen])
        assert (cached.float() - logits.float()).abs().max() < tolerance * logits.float().std()
