"""What an attention kernel takes, gives and may refuse.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads (H a multiple of Hk, never repeated),
D head width, N documents. Scores are scale * q.k; query head h reads key/value head h // (H / Hk).

Inputs may have any strides, and results can be written where they belong: `out`, `dq`, `dk` and `dv` take a slice of
heads or of positions of a larger tensor. A kernel whose own interface takes such an output writes it directly, any
other one copies; the caller sees no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv."""
Targets: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Where dq, dk, dv are wanted; None anywhere."""


class KernelUnavailable(ValueError):
    """A kernel that cannot run here, or cannot compute what was asked; the message says why and what can."""


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


@dataclass(frozen=True)
class Capabilities:
    """What a kernel takes. Anything else it refuses."""

    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    window: bool = True
    documents: bool = True
    rectangular: bool = True
    """Causal with an offset other than 0, or with Sq other than Sk."""
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    deterministic: bool = True
    """Its backward can be asked to give the same bits every time."""

    def refusal(
        self,
        *,
        device_type: str,
        dtype: torch.dtype,
        head_dim: int,
        window: bool = False,
        documents: bool = False,
        rectangular: bool = False,
        deterministic: bool = False,
    ) -> str | None:
        """Why this cannot be computed, in words that follow the kernel's name; None if it can."""
        if device_type not in self.device_types:
            return f"runs on {' and '.join(self.device_types)} tensors, not {device_type}"
        if dtype not in self.dtypes:
            return f"takes {_names(self.dtypes)}, not {_names([dtype])}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"takes head_dim up to {self.max_head_dim}, not {head_dim}"
        if head_dim % self.head_dim_multiple:
            return f"takes head_dim in multiples of {self.head_dim_multiple}, not {head_dim}"
        if window and not self.window:
            return "has no sliding window"
        if documents and not self.documents:
            return "has no document mask"
        if rectangular and not self.rectangular:
            return "takes a causal mask only over as many queries as keys with offset 0"
        if deterministic and not self.deterministic:
            return "has no deterministic backward"
        return None


class AttentionKernel(ABC):
    """One implementation of attention, forward and backward, without autograd.

    Neither call waits for the device. A subclass implements `_forward` and `_backward` over checked inputs; it may
    write its results into the targets it is handed and return those, or return others, which are then copied.
    """

    name: str
    capabilities: Capabilities

    @abstractmethod
    def availability(self) -> str | None:
        """None if this kernel can run on this machine; else what is missing and how to install it."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention and the logarithm of each row's softmax denominator.

        Args:
            q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D], of one dtype and device.
            scale: multiplies q.k.
            out: written and returned if given: [B, Sq, H, D] in q's dtype, contiguous in D, apart from the inputs.

        Returns:
            out [B, Sq, H, D] in q's dtype, and lse [B, H, Sq], natural logarithm, fp32 (fp64 for fp64
            inputs), of any strides. A row that sees no key has out 0 and lse -inf.

        Raises:
            KernelUnavailable: the kernel does not declare what this call needs.
            ValueError: shapes that do not fit each other or the mask.
        """
        self._check(q, k, v, mask)
        _check_target("out", out, q)
        result, lse = self._forward(q, k, v, scale, mask, out)
        return placed(result, out), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        mask: AttentionMask,
        deterministic: bool = False,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> Gradients:
        """Gradients of sum(dout * out) in the dtype of q, k, v.

        `out` and `lse` may come from a larger set of keys than `k` (ring attention): the result is then this
        set's share of the whole gradient, and shares add up. Rows that see no key of this call give 0.

        Args:
            dout, out: [B, Sq, H, D] in q's dtype; lse: [B, H, Sq] as `forward` gives it.
            deterministic: the same inputs give the same bits, at some cost in time.
            dq, dk, dv: written (not added to) and returned if given: shaped like q, k, v, contiguous in D, apart from
                each other and from the inputs.

        Returns:
            dq [B, Sq, H, D], dk and dv [B, Sk, Hk, D].

        Raises:
            KernelUnavailable, ValueError: as `forward`.
        """
        self._check(q, k, v, mask, deterministic)
        assert dout.shape == out.shape == q.shape, (dout.shape, out.shape, q.shape)
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]), (lse.shape, q.shape)
        for name, target, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
            _check_target(name, target, like)
        results = self._backward(dout, q, k, v, out, lse, scale, mask, deterministic, (dq, dk, dv))
        return placed(results[0], dq), placed(results[1], dk), placed(results[2], dv)

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask, out: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        mask: AttentionMask,
        deterministic: bool,
        targets: Targets,
    ) -> Gradients: ...

    def _check(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, deterministic: bool = False) -> None:
        batch, queries, heads, head_dim = q.shape
        keys, kv_heads = k.shape[1:3]
        if k.shape != (batch, keys, kv_heads, head_dim) or v.shape != k.shape or heads % kv_heads:
            raise ValueError(
                f"q {list(q.shape)} needs k and v of one shape [{batch}, keys, heads dividing {heads}, "
                f"{head_dim}], got k {list(k.shape)} and v {list(v.shape)}"
            )
        if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
            raise ValueError(
                f"q, k and v must share dtype and device, got {_names([q.dtype, k.dtype, v.dtype])} on "
                f"{q.device}, {k.device}, {v.device}"
            )
        why = self.capabilities.refusal(
            device_type=q.device.type,
            dtype=q.dtype,
            head_dim=head_dim,
            window=mask.window is not None,
            documents=mask.documents is not None,
            rectangular=mask.causal and (mask.offset != 0 or queries != keys),
            deterministic=deterministic,
        )
        if why is not None:
            raise KernelUnavailable(f"attention kernel {self.name} {why}; kernel math takes every mask and dtype")
        if mask.packing is not None:
            _check_packing(*mask.packing, batch, queries, keys)


def placed(result: Tensor, target: Tensor | None) -> Tensor:
    """`result` in `target`, if there is one: a copy unless the kernel wrote there and returned it."""
    return result if target is None or result is target else target.copy_(result)


def _check_target(name: str, target: Tensor | None, like: Tensor) -> None:
    if target is None:
        return
    if target.shape != like.shape or target.dtype != like.dtype or target.device != like.device:
        raise ValueError(
            f"{name} must be {list(like.shape)} {_names([like.dtype])} on {like.device}, got {list(target.shape)} "
            f"{_names([target.dtype])} on {target.device}"
        )
    if target.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, its stride there is {target.stride(-1)}")


def _check_packing(documents: Documents, key_documents: Documents, batch: int, queries: int, keys: int) -> None:
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


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
