"""Between text and token ids, for what people write and read: prompts and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from launch.data.encoders import BYTES, read_tokenizer


class TextCodec(Protocol):
    """Both ways."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteCodec:
    """A token is a byte of UTF-8; bytes that form no character are shown as the replacement character."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class TokenizerCodec:
    """A Hugging Face tokenizer.json. A text gets the special tokens that the tokenizer puts at the start of a document,
    not those at its end; none is shown."""

    def __init__(self, path: str):
        """Raises CorpusError."""
        self._tokenizer, _ = read_tokenizer(path)

    def encode(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text)
        ids = list(encoded.ids)
        for special in reversed(encoded.special_tokens_mask):
            if not special or len(ids) == 1:
                break
            ids.pop()
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))


def text_codec(tokenizer: str) -> TextCodec:
    """The codec of `data.tokenizer`. Raises CorpusError."""
    return ByteCodec() if tokenizer == BYTES else TokenizerCodec(tokenizer)
