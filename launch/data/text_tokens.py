"""Blocks of text to token ids: what a worker process of `launch/prepare_data.py` does."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from launch.data.corpus import Int64, Tokens
from launch.data.encoders import encoder_of
from launch.data.text_inputs import Block

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """A record that is no text."""

    record: int
    """Counted from 1, as lines are."""
    reason: str


@dataclass(frozen=True)
class TokenisedBlock:
    """The documents of a block."""

    tokens: Tokens
    lengths: Int64
    continues: bool
    """The last document is not at its end."""
    faults: list[Fault]


def without_documents(faults: list[Fault]) -> TokenisedBlock:
    """A block of nothing but faults."""
    return TokenisedBlock(np.empty(0, np.int64), np.empty(0, np.int64), False, faults)


class BlockTokeniser:
    """Texts to documents; `end_of_document` (a token of the tokenizer's) is put after each."""

    def __init__(self, tokenizer: str, field_name: str, end_of_document: str | None) -> None:
        """Raises CorpusError where the tokenizer cannot be read or has no such token."""
        self._encoder, self._field = encoder_of(tokenizer), field_name
        self._end = [] if end_of_document is None else [self._encoder.token_id(end_of_document)]

    def __call__(self, block: Block) -> TokenisedBlock:
        records = list(_records(block, self._field))
        texts = [text for text in records if text and isinstance(text, str)]
        whole = block.first and block.last
        # Of a stretch of a document, what the tokenizer puts at a text's ends stands only where the document ends.
        before, after = ([], []) if whole else self._encoder.at_the_ends()
        head = self._array(before if block.first else [])
        tail = self._array([*after, *self._end] if block.last else [])
        bodies = [self._array(ids) for ids in self._encoder.ids(texts, special=whole)]
        lengths = np.array([len(head) + len(body) + len(tail) for body in bodies], dtype=np.int64)
        tokens = np.concatenate([self._array([]), *(part for body in bodies for part in (head, body, tail))])
        return TokenisedBlock(tokens, lengths, not block.last, [fault for fault in records if isinstance(fault, Fault)])

    def _array(self, ids: npt.ArrayLike) -> Tokens:
        return np.asarray(ids, dtype=self._encoder.dtype)


def _records(block: Block, name: str) -> Iterator[str | Fault]:
    """The text of each record of a block, or why it is none."""
    if block.kind == "text":
        assert isinstance(block.content, bytes)
        yield block.content.decode()
        return
    lines = block.content.split(b"\n") if isinstance(block.content, bytes) else block.content
    for record, line in enumerate(lines, start=block.start.record + 1):
        if block.kind == "jsonl" and not (line and line.strip()):
            continue
        try:
            text = None if line is None else _field(line, name) if block.kind == "jsonl" else line.decode()
            if not isinstance(text, str):
                raise ValueError(f"{name} is {json.dumps(text)[:40]}, not text")
            text.encode()  # lone surrogates, which JSON can write and no tokenizer reads
            yield text
        except (ValueError, RecursionError) as error:  # the second of JSON that is nested too deep
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            yield Fault(record, f"{kind}{error}")


def _field(line: bytes, name: str) -> object:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object with the field {name}")
    if name not in found:
        raise ValueError(f"no field {name}; its fields are {', '.join(found) or 'none'}")
    return found[name]


class TokenisingProcesses:
    """Worker processes that tokenise blocks, each in one thread; results come in the order of the blocks."""

    DEPTH = 16
    """Blocks under way for each worker, finished ones that wait for their turn included: enough to work on while this
    process waits for the disk. It bounds the memory."""

    def __init__(self, workers: int, tokenizer: str, field_name: str, end_of_document: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._inbox, self._outbox = context.Queue(), context.Queue()
        arguments = (self._inbox, self._outbox, tokenizer, field_name, end_of_document)
        self._processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def map(self, blocks: Iterable[tuple[T, Block | TokenisedBlock]]) -> Iterator[tuple[T, TokenisedBlock]]:
        """Each block's tokens with what came along with it; what is tokenised already keeps its place among them.

        Raises RuntimeError where a worker dies.
        """
        waiting: deque[tuple[int, T]] = deque()
        ready: dict[int, TokenisedBlock] = {}
        for number, (label, block) in enumerate(blocks):
            waiting.append((number, label))
            if isinstance(block, TokenisedBlock):
                ready[number] = block
            else:
                self._inbox.put((number, block))
            while waiting and (waiting[0][0] in ready or len(waiting) >= self.DEPTH * len(self._processes)):
                first, its_label = waiting.popleft()
                yield its_label, self._take(first, ready)
        for number, label in waiting:
            yield label, self._take(number, ready)

    def _take(self, number: int, ready: dict[int, TokenisedBlock]) -> TokenisedBlock:
        while number not in ready:
            try:
                done, result = self._outbox.get(timeout=1)
                ready[done] = result
            except queue.Empty:
                dead = [process for process in self._processes if not process.is_alive()]
                if dead:
                    raise RuntimeError(
                        f"a tokenising process ended with status {dead[0].exitcode}; where memory ran out, lower "
                        "--workers; the same command goes on where this one stopped"
                    ) from None
        return ready.pop(number)


def _work(inbox: Any, outbox: Any, tokenizer: str, field_name: str, end_of_document: str | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs in parallel
    tokenise = BlockTokeniser(tokenizer, field_name, end_of_document)
    while True:
        number, block = inbox.get()
        outbox.put((number, tokenise(block)))
