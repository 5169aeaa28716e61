"""What an attention kernel takes, returns and may refuse.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads (H a multiple of K, never repeated), D head_dim.
Scores are scale * q.k; query head h reads key/value head h // (H / K).

Inputs may have any strides. Results can be written in place: `out`, `dq`, `dk` and `dv` take a slice of heads or of
positions of a larger tensor. A kernel whose own interface takes such an output writes it directly, any other one
copies; the caller sees no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from model.kernels.mask import AttentionMask, check_packing

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv."""
Targets: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Where dq, dk, dv are wanted; None anywhere."""


class KernelUnavailable(ValueError):
    """A kernel that cannot run here, or cannot compute what was asked; the message says why and what can."""


@dataclass(frozen=True)
class Capabilities:
    """What a kernel accepts. It refuses anything else."""

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
            q: [B, Sq, H, D]; k, v: [B, Sk, K, D], of one dtype and device.
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
            dq [B, Sq, H, D], dk and dv [B, Sk, K, D].

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
            check_packing(*mask.packing, batch, queries, keys)


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


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
