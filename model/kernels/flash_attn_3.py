"""Backend `flash_attn_3`: FlashAttention-3 from the package flash_attn_3, for Hopper (sm_90).

The package is not on PyPI and builds from the folder `hopper` of FlashAttention's repository; its module is called
`flash_attn_interface`. The calls are its registered custom operators. dq, dk and dv are written through their strides.
The forward operator has an `out_` too but returns it, which torch forbids a custom operator: out is copied.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from model.kernels.banded import Band, Packing, Tensors, packing_arguments, unit_stride, writable
from model.kernels.cuda import PackagedKernel, import_or_reason
from model.kernels.protocol import Capabilities, Gradients, Targets

_MODULE = "flash_attn_interface"
_REMEDY = (
    "it is not on PyPI: pip install --no-build-isolation "
    "'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper' "
    "(needs nvcc 12.3 or later; set MAX_JOBS to what memory allows)"
)
_OPERATORS = ("_flash_attn_forward", "_flash_attn_backward")


@cache
def _load() -> tuple[ModuleType | None, str]:
    package, why = import_or_reason(_MODULE, _REMEDY)
    # Before they were custom operators, the same names took their windows as one pair.
    old = [name for name in _OPERATORS if not hasattr(getattr(package, name, None), "register_autograd")]
    if package is not None and old:
        return None, f"has a flash-attn 3 from before {', '.join(old)} became custom operators; {_REMEDY}"
    return package, why


class FlashAttn3Kernel(PackagedKernel):
    """flash_attn_interface, Shah et al. 2024."""

    name = "flash_attn_3"
    # 256 has no deterministic backward and is left to FlashAttention-2.
    capabilities = Capabilities(
        device_types=("cuda",), dtypes=(torch.bfloat16, torch.float16), max_head_dim=192, head_dim_multiple=8
    )
    compute_capabilities = (9,)
    load = staticmethod(_load)

    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        del target
        q, k, v = (unit_stride(x) for x in (q, k, v))
        out, lse, *_ = self.package._flash_attn_forward(q, k, v, causal=band.causal, **_shared(scale, band, packing))
        return out, lse

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        dout, q, k, v, out, lse = tensors
        dq, dk, dv = map(writable, targets, (q, k, v))
        self.package._flash_attn_backward(
            *(unit_stride(x) for x in (dout, q, k, v, out)),
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=band.causal,
            deterministic=deterministic,
            **_shared(scale, band, packing),
        )
        return dq, dk, dv


def _shared(scale: float, band: Band, packing: Packing) -> dict[str, float | Tensor]:
    """The arguments forward and backward call by the same names."""
    left, right = band.flash_bounds
    bounds = {"window_size_left": left, "window_size_right": right}
    return {"softmax_scale": scale, **bounds, **packing_arguments(packing)}
