"""Text from a model, one token at a time, on whatever layout holds it.

Every rank runs each forward pass on the whole batch, so a model cut by tensor parallelism, or sharded by ZeRO, serves
as it is; with context parallelism all ranks attend alone. Shapes: B sequences, P tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from launch.inference.sampling import Sampling, choose
from model.attention import AttentionFunction
from model.gpt import GPT
from model.kv_cache import KVCache

Finished = Callable[[int, list[int]], bool]
"""(number of the sequence, tokens generated for it so far) -> whether it ends there."""


@torch.no_grad()
def generate(
    forward: Callable[..., Any],
    model: GPT,
    attention: Sequence[AttentionFunction],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    *,
    device: torch.device,
    window: int | None = None,
    multiple_of: int = 1,
    finished: Finished = lambda row, tokens: False,
) -> list[list[int]]:
    """Up to `max_tokens` tokens after each prompt (of one token at least). Collective; all ranks return the same.

    `forward` runs `model`: the model itself or the engine around it. `attention` is each block's causal self-attention
    on one device, for the prompts. `window` bounds what a token sees to so many tokens, where the model's own window is
    not narrower. Each pass is padded to `multiple_of` tokens, which sequence parallelism splits evenly.
    """
    assert prompts and all(prompts) and max_tokens > 0, "generation starts from at least one token"
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(
        lengths,
        max(lengths) + max_tokens,
        attention,
        scale=model.config.head_dim**-0.5,
        window=window,
        device=device,
    )
    streams, written = sampling.streams(len(prompts)), [list[int]() for _ in prompts]
    ends = [False] * len(prompts)
    input_ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)

    def logits(tokens: Tensor, position_ids: Tensor) -> Tensor:
        """[B, V] of what follows each sequence's last token."""
        surplus = -tokens.shape[1] % multiple_of
        return forward(*(functional.pad(tensor, (0, surplus)) for tensor in (tokens, position_ids)))[:, -1]

    # Blocks compiled for training would be compiled again for every length.
    with cache.serving(model), torch.compiler.set_stance("force_eager"):
        following = logits(input_ids, torch.arange(max(lengths), device=device).expand_as(input_ids))
        while True:
            chosen = _agreed(choose(following, sampling, streams))
            for row, token in enumerate(chosen.tolist()):
                if not ends[row]:
                    written[row].append(token)
                    ends[row] = len(written[row]) == max_tokens or finished(row, written[row])
            if all(ends):
                return written
            following = logits(chosen.unsqueeze(1), cache.position_ids)
            cache.advance()


def _agreed(chosen: Tensor) -> Tensor:
    """Rank 0's choice, on every rank: logits may differ in their last bit."""
    if dist.is_initialized():
        dist.broadcast(chosen, src=0)
    return chosen
