"""Text to token ids and back, by a Hugging Face tokenizer or as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from launch.data.corpus import CorpusError, Tokens
from launch.data.indexed import token_type

BYTES = "bytes"
"""Stands for no tokenizer: a token is a byte of UTF-8."""


class Encoder(Protocol):
    """Turns texts into token ids, and token ids into texts."""

    dtype: np.dtype
    """The type of tokens in a corpus."""
    vocab_size: int
    identity: str
    """Changes whenever the tokens of a text would."""

    def encode(self, paths: Sequence[Path], contents: Sequence[bytes]) -> list[Tokens]:
        """The tokens of each file. Raises CorpusError, by its path, for one that this encoder does not read."""

    def ids(self, texts: list[str], *, special: bool = True) -> Sequence[npt.ArrayLike]:
        """Token ids of each text; `special` with what the tokenizer's own post-processor puts at a text's ends."""

    def at_the_ends(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""

    def token_id(self, token: str) -> int:
        """Raises CorpusError where there is no such token."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; special ones are not shown."""

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text that is to be gone on with: with the special tokens before it, without those after it.

        Of no text, where nothing stands before it, the first of those after it.
        """
        before, after = self.at_the_ends()
        [ids] = self.ids([text], special=False)
        return [*before, *np.asarray(ids).tolist()] or after[:1]


class ByteEncoder(Encoder):
    """Token = byte; any file will do."""

    dtype: np.dtype = np.dtype("u1")
    vocab_size = 256
    identity = BYTES

    def encode(self, paths: Sequence[Path], contents: Sequence[bytes]) -> list[Tokens]:
        return [np.frombuffer(content, dtype=np.uint8) for content in contents]

    def ids(self, texts: list[str], *, special: bool = True) -> Sequence[npt.ArrayLike]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def at_the_ends(self) -> tuple[list[int], list[int]]:
        return [], []

    def token_id(self, token: str) -> int:
        if len(token.encode()) != 1:
            raise CorpusError(
                f"{token!r} is no byte, and with the tokenizer {BYTES} a token is one; name one character"
            )
        return token.encode()[0]

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that form no character are shown as the replacement character."""
        return bytes(token for token in tokens if token < self.vocab_size).decode(errors="replace")


class TokenizerEncoder(Encoder):
    """A Hugging Face tokenizer.json."""

    def __init__(self, path: str) -> None:
        """Raises CorpusError."""
        self._tokenizer, content = read_tokenizer(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # ids may have holes
        self.dtype: np.dtype = token_type(self.vocab_size)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, paths: Sequence[Path], contents: Sequence[bytes]) -> list[Tokens]:
        texts = [_decode(path, content) for path, content in zip(paths, contents, strict=True)]
        return [np.array(ids, dtype=self.dtype) for ids in self.ids(texts)]

    def ids(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def at_the_ends(self) -> tuple[list[int], list[int]]:
        # Around a text of which it writes something, which "a" need not be.
        for text in ("a", *self._tokenizer.get_vocab()):
            encoding = self._tokenizer.encode(text)
            if 0 in (added := encoding.special_tokens_mask):
                before, after = added.index(0), added[::-1].index(0)
                return encoding.ids[:before], encoding.ids[len(added) - after :]
        return [], []

    def token_id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CorpusError(f"{token!r} is none of the tokenizer's {self.vocab_size} tokens; name one that it has")
        return int(found)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))


def read_tokenizer(path: str) -> tuple[Any, str]:
    """The tokenizer at a path, and its file's text. Raises CorpusError."""
    remedy = f"give {BYTES} or the path of a tokenizer.json"
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"the tokenizer {path!r} cannot be read ({error}); {remedy}") from error
    try:
        return Tokenizer.from_str(content), content
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise CorpusError(f"the tokenizer {path!r} is no tokenizer.json ({error}); {remedy}") from error


def byte_tokenizer() -> Tokenizer:
    """`bytes` as a Hugging Face tokenizer, for other programs: token i is byte i of UTF-8, and nothing is merged.

    Its tokens are spelt in the characters that GPT-2 gave the bytes (Radford et al. 2019): printable ones their own,
    the others those from U+0100 on.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(letter) for letter in letters if ord(letter) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    tokenizer = Tokenizer(models.BPE(vocab=dict(zip(letters, printable + others, strict=True)), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_for(path: Path) -> str:
    """What data.tokenizer is for the tokenizer.json at `path`: `bytes` where it is that. Raises CorpusError."""
    return BYTES if read_tokenizer(str(path))[0].to_str() == byte_tokenizer().to_str() else str(path)


def encoder_of(tokenizer: str) -> Encoder:
    """The encoder of `bytes`, or of the tokenizer.json at a path. Raises CorpusError."""
    return ByteEncoder() if tokenizer == BYTES else TokenizerEncoder(tokenizer)


def _decode(path: Path, content: bytes) -> str:
    remedy = f"leave it out of data.files, or use data.tokenizer: {BYTES}"
    if (position := content.find(b"\0")) >= 0:
        raise CorpusError(f"{path}: binary, not text (NUL at byte {position}); {remedy}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text (at byte {error.start}); {remedy}") from error
