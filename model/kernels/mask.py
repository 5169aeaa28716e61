"""The mask of an attention call: which query sees which key, and the documents that are packed in its rows.

Shapes: B batch, S sequence, N documents.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Packed documents of a [B, S] batch: they tile its B*S positions row by row, and none crosses a row."""

    boundaries: tuple[int, ...]
    """On the host: 0 = b0 < b1 < ... < bN = B*S, every multiple of S among them."""
    host: Tensor = field(compare=False, repr=False)
    """The same N + 1 numbers, int32, on the host."""
    cu_seqlens: Tensor = field(compare=False, repr=False)
    """And on the device that computes: kernels read it without a copy."""
    max_seqlen: int
    """Tokens in the longest document."""

    @classmethod
    def from_boundaries(cls, boundaries: Sequence[int], device: torch.device | str) -> Documents:
        """Copies `boundaries` to `device`, once a batch.

        Raises:
            ValueError: boundaries do not rise strictly from 0.
        """
        lengths = [end - start for start, end in pairwise(boundaries)]
        if not lengths or boundaries[0] != 0 or min(lengths) < 1:
            raise ValueError(
                "document boundaries must rise strictly from 0 and hold at least one document, got "
                f"{list(boundaries)[:8]}"
            )
        # From pinned memory the copy does not hold up the host; from ordinary memory it would wait for the device.
        host = torch.tensor(boundaries, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
        return cls(tuple(boundaries), host, host.to(device, non_blocking=True), max(lengths))

    @classmethod
    def from_tensors(cls, host: Tensor, cu_seqlens: Tensor) -> Documents:
        """The documents that these two tensors of another `Documents` describe."""
        boundaries = tuple(host.tolist())
        return cls(boundaries, host, cu_seqlens, max(end - start for start, end in pairwise(boundaries)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - start for start, end in pairwise(self.boundaries)]

    def check_tiles(self, batch: int, sequence: int) -> None:
        """Raises ValueError unless these documents tile `batch` rows of `sequence` positions."""
        if self.boundaries[-1] != batch * sequence:
            raise ValueError(
                f"the documents hold {self.boundaries[-1]} tokens but the batch holds {batch} x {sequence} = "
                f"{batch * sequence}; the last boundary must be the batch's size"
            )
        for row_end in range(sequence, batch * sequence, sequence):
            if self.boundaries[bisect_left(self.boundaries, row_end)] != row_end:
                raise ValueError(
                    f"a document crosses position {row_end}, the end of a row of {sequence}; cut it there: "
                    f"every multiple of {sequence} must be a boundary"
                )


@dataclass(frozen=True)
class AttentionMask:
    """Query i sees key j of one call if all of these hold."""

    causal: bool = True
    """j <= i + offset."""
    window: int | None = None
    """i + offset - j < window: the token itself counts."""
    offset: int = 0
    """Position of the first query minus position of the first key."""
    documents: Documents | None = None
    """Same document; only with offset 0, and with as many queries as keys unless `key_documents` says otherwise."""
    key_documents: Documents | None = None
    """Documents of the keys where they hold more than those of the queries (context parallelism: a query chunk against
    the keys it was sent). Query document n sees key document n, the two aligned at their ends: query i of a tokens
    stands at position i + b - a of its b >= a keys, and causal and window count from there. None: as `documents`."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1: the token itself counts")
        if self.documents is not None and self.offset != 0:
            raise ValueError(f"a mask with documents must have offset 0, got {self.offset}")
        if self.key_documents is not None:
            if self.documents is None:
                raise ValueError("key_documents need documents, which describe the queries")
            lengths, key_lengths = self.documents.lengths, self.key_documents.lengths
            if len(lengths) != len(key_lengths):
                raise ValueError(f"there must be a key document for each of {len(lengths)}, got {len(key_lengths)}")
            for n, (queries, keys) in enumerate(zip(lengths, key_lengths, strict=True)):
                if queries > keys:
                    raise ValueError(
                        f"document {n} has {queries} queries but {keys} keys; every query needs the key at its position"
                    )

    @property
    def packing(self) -> tuple[Documents, Documents] | None:
        """Documents of the queries and of the keys; None if there are none."""
        return None if self.documents is None else (self.documents, self.key_documents or self.documents)


def check_packing(documents: Documents, key_documents: Documents, batch: int, queries: int, keys: int) -> None:
    """Raises ValueError unless they tile `batch` rows of so many queries and keys, each document in one row of both."""
    if key_documents is documents:
        if queries != keys:
            raise ValueError(
                f"a mask with documents needs as many queries as keys, got {queries} and {keys}; "
                "more keys need key_documents"
            )
        documents.check_tiles(batch, queries)
        return
    documents.check_tiles(batch, queries)
    key_documents.check_tiles(batch, keys)
    for row in range(1, batch):
        before = bisect_left(documents.boundaries, row * queries)
        keys_before = bisect_left(key_documents.boundaries, row * keys)
        if before != keys_before:
            raise ValueError(
                f"the first {row} rows hold {before} documents of queries but {keys_before} of keys; a document's "
                "queries and keys must stand in the same row"
            )
