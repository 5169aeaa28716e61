"""Corpora whose tokens say where they lie."""

from __future__ import annotations

import numpy as np

from launch.data.corpus import Corpus, Int64


def corpus_of(*lengths: int, name: str = "training") -> Corpus:
    """Documents of these lengths; token i of the corpus is i, so that every position is recognisable."""
    return Corpus.from_documents(name, np.arange(sum(lengths), dtype=np.uint32), lengths, "test")


def edges(corpus: Corpus) -> list[int]:
    """Where the documents begin, and the corpus's end."""
    return [0, *corpus.document_starts(0, len(corpus)).tolist(), len(corpus)]


def contents(corpus: Corpus) -> Int64:
    return corpus.read(0, len(corpus))
