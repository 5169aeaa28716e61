"""The key-value cache of generation: keys and values of the tokens seen so far, and how the next token attends.

Shapes: B sequences, S tokens of one call, T tokens seen, C capacity, H query heads, K key/value heads, G = H / K query
heads of each, D head_dim.

The model does not know of it: while a cache is in use, it takes the place of attention. Prompts are padded on the
right, so that every token keeps its own position and nothing real ever sees padding. The tokens generated for a row
overwrite its padding one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from model.attention import Attention, AttentionFunction
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import Documents


def cache_bytes(config: ModelConfig, sequences: int, capacity: int, key_heads: int, dtype: torch.dtype) -> int:
    """Bytes of the buffers of all layers, with `key_heads` of each on this device."""
    numbers = 2 * config.num_hidden_layers * sequences * capacity * key_heads * config.head_dim
    return numbers * dtype.itemsize


class KVCache:
    """The cache of all layers. Under `serving`, the model's first call takes the prompts [B, S], each later one the
    next token of every sequence [B, 1] at `position_ids`; its logits are those of each sequence's last token [B, 1, V].
    Later calls may be padded on the right too, by tokens that nobody sees.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        attention: Sequence[AttentionFunction],
        *,
        scale: float,
        window: int | None,
        device: torch.device,
    ):
        """`lengths`: tokens of each prompt, of at most `capacity`. `attention` serves the prompts, block by block, and
        has the model's windows. `window` bounds what a later token sees where the model's own window is wider."""
        assert min(lengths) > 0 and max(lengths) <= capacity, (lengths, capacity)
        self.capacity, self.attention, self.scale, self.window = capacity, attention, scale, window
        self.rows = torch.arange(len(lengths), device=device)
        self.lengths = torch.tensor(lengths, device=device)
        self.shortest, self.longest = min(lengths), max(lengths)
        self.prompts_seen = False

    @property
    def position_ids(self) -> Tensor:
        """[B, 1] positions of the tokens to come."""
        return self.lengths.unsqueeze(1)

    def advance(self) -> None:
        """Call it after each pass over tokens that follow the prompts."""
        self.lengths, self.shortest, self.longest = self.lengths + 1, self.shortest + 1, self.longest + 1

    @contextmanager
    def serving(self, model: GPT) -> Iterator[None]:
        """Puts the cache in the place of the model's attention, and only the last token before its head."""
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        before = [attention.attend for attention in attentions]
        hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: (self._last(inputs[0]), *inputs[1:]))
        try:
            for attention, attend, own in zip(attentions, self.attention, model.config.windows, strict=True):
                window = min((bound for bound in (own, self.window) if bound is not None), default=None)
                attention.attend = _CachedAttention(self, attend, window)
            yield
        finally:
            hook.remove()
            for attention, attend in zip(attentions, before, strict=True):
                attention.attend = attend

    def _last(self, hidden: Tensor) -> Tensor:
        """[B, S, E] -> [B, 1, E]."""
        if self.prompts_seen:
            return hidden[:, :1]
        self.prompts_seen = True
        return hidden[self.rows, self.lengths - 1].unsqueeze(1)

    def seen(self, window: int | None) -> tuple[slice, Tensor]:
        """The part of the buffers that the next token of any row may see, and which of it each row does: [B, 1, 1, T].

        Row b's next token stands at position lengths[b] and sees that position and those before it, back to `window`.
        """
        first = 0 if window is None else max(0, self.shortest + 1 - window)
        columns = torch.arange(first, self.longest + 1, device=self.lengths.device)
        behind = self.position_ids - columns
        visible = behind >= 0
        if window is not None:
            visible &= behind < window
        return slice(first, self.longest + 1), visible[:, None, None]


class _CachedAttention:
    """One layer's buffers [B, C, K, D], as many heads as the layer has on this device."""

    def __init__(self, cache: KVCache, attend: AttentionFunction, window: int | None):
        """`attend` serves the prompts; later tokens see `window` tokens."""
        self.cache, self.attend, self.window = cache, attend, window
        self.keys = self.values = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """q [B, S, H, D], k and v [B, S, K, D] -> [B, S, H, D]."""
        assert documents is None, "sequences in generation are documents of their own"
        cache = self.cache
        if not cache.prompts_seen:
            self.keys, self.values = (x.new_zeros(x.shape[0], cache.capacity, *x.shape[2:]) for x in (k, v))
            self.keys[:, : k.shape[1]], self.values[:, : v.shape[1]] = k, v
            return self.attend(q, k, v, None)
        assert cache.longest < cache.capacity, (cache.longest, cache.capacity)
        self.keys[cache.rows, cache.lengths], self.values[cache.rows, cache.lengths] = k[:, 0], v[:, 0]
        columns, visible = cache.seen(self.window)
        keys, values = self.keys[:, columns].transpose(1, 2), self.values[:, columns].transpose(1, 2)
        # The G query heads of a key head stand where a sequence of queries would: keys are read once, never repeated.
        grouped = q[:, 0].unflatten(1, (k.shape[2], -1))
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=cache.scale)
        return functional.pad(out.flatten(1, 2).unsqueeze(1), (0, 0, 0, 0, 0, q.shape[1] - 1))
