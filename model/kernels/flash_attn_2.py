"""Backend `flash_attn_2`: FlashAttention-2 from the package flash-attn (2.8), for Ampere and later.

The calls are the package's registered custom operators, below its autograd functions: they give the log-sum-exp and
take it back. Grouped heads go in as they are; the backward sums its dk and dv over each group itself. dq, dk and dv are
written through their strides; the forward operator returns an out of its own.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from model.kernels.banded import Band, Packing, Tensors, writable
from model.kernels.cuda import PackagedKernel, import_or_reason
from model.kernels.mask import Documents
from model.kernels.protocol import Capabilities, Gradients, Targets

_MODULE = "flash_attn.flash_attn_interface"
_REMEDY = "pip install 'ringzero[flash2]' (flash-attn 2.8, built for this torch)"
_OPERATORS = (
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_varlen_forward",
    "_wrapped_flash_attn_varlen_backward",
)


@cache
def _load() -> tuple[ModuleType | None, str]:
    package, why = import_or_reason(_MODULE, _REMEDY)
    lacking = [name for name in _OPERATORS if package is not None and not hasattr(package, name)]
    if lacking:
        return None, f"needs flash-attn 2.8, the installed one lacks {', '.join(lacking)}; {_REMEDY}"
    return package, why


class FlashAttn2Kernel(PackagedKernel):
    """flash_attn.flash_attn_interface, Dao 2023."""

    name = "flash_attn_2"
    capabilities = Capabilities(
        device_types=("cuda",), dtypes=(torch.bfloat16, torch.float16), max_head_dim=256, head_dim_multiple=8
    )
    compute_capabilities = (8, 9, 10, 11, 12)
    load = staticmethod(_load)

    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        del target  # the operator takes none
        options = _options(scale, band)
        if packing is None:
            out, lse, *_ = self.package._wrapped_flash_attn_forward(q, k, v, *options, return_softmax=False)
        else:
            out, lse, *_ = self.package._wrapped_flash_attn_varlen_forward(
                q, k, v, *_lengths(*packing), *options, return_softmax=False
            )
        return out, lse

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        dq, dk, dv = map(writable, targets, tensors[1:4])
        options = _options(scale, band)
        if packing is None:
            self.package._wrapped_flash_attn_backward(*tensors, dq, dk, dv, *options, deterministic)
        else:
            self.package._wrapped_flash_attn_varlen_backward(
                *tensors, dq, dk, dv, *_lengths(*packing), *options, deterministic
            )
        return dq, dk, dv


def _options(scale: float, band: Band) -> tuple[float, float, bool, int, int, float, None]:
    """dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes."""
    return 0.0, scale, band.causal, *band.flash_bounds, 0.0, None


def _lengths(documents: Documents, key_documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    return documents.cu_seqlens, key_documents.cu_seqlens, documents.max_seqlen, key_documents.max_seqlen
