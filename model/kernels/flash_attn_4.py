"""Backend `flash_attn_4`: FlashAttention-4 from the package flash-attn-4, for Hopper (sm_90) and Blackwell
(sm_100).

Written in CuTe DSL and compiled as it runs: the first call of each kind (dtype, head_dim, heads per group, mask kind)
takes seconds. The package shares the folder `flash_attn/cute` with flash-attn 2, whose old copy has another interface.
out, dq, dk and dv are written through their strides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from model.kernels.banded import Band, Packing, Tensors, direct, packing_arguments
from model.kernels.cuda import PackagedKernel, import_or_reason
from model.kernels.protocol import Capabilities, Gradients, Targets

_MODULE = "flash_attn.cute.interface"
_REMEDY = "pip install 'ringzero[flash4]' (flash-attn-4 4.0.0b36; after flash-attn 2 where both are wanted)"


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:  # the module alone proves nothing: flash-attn 2 installs one of the same name
        version("flash-attn-4")
    except PackageNotFoundError:
        return None, f"needs the package flash-attn-4, which is not installed; {_REMEDY}"
    package, why = import_or_reason(_MODULE, _REMEDY)
    # `learnable_sink` entered the backward long after flash-attn 2.8 froze its copy of this module.
    if package is not None and "learnable_sink" not in inspect.signature(package._flash_attn_bwd).parameters:
        return (
            None,
            f"finds flash-attn 2's old copy of flash_attn/cute in its place ({package.__file__}); {_REMEDY}",
        )
    return package, why


class FlashAttn4Kernel(PackagedKernel):
    """flash_attn.cute.interface, whose backward on Hopper takes the heads in turns (`_heads_in_turns`)."""

    name = "flash_attn_4"
    # Blackwell stops at 128 but for two special shapes; Hopper's 192 and 256 are left to FlashAttention-2.
    capabilities = Capabilities(
        device_types=("cuda",), dtypes=(torch.bfloat16, torch.float16), max_head_dim=128, head_dim_multiple=8
    )
    compute_capabilities = (9, 10)
    load = staticmethod(_load)

    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self.package._flash_attn_fwd(
            q, k, v, softmax_scale=scale, **_masking(band, packing), return_lse=True, out=direct(target)
        )
        return out, lse

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        dout, q, k, v, out, lse = tensors
        into = (direct(target) for target in targets)
        with _heads_in_turns(self.package):
            dq, dk, dv = self.package._flash_attn_bwd(
                q,
                k,
                v,
                out,
                dout,
                lse,
                softmax_scale=scale,
                **_masking(band, packing),
                deterministic=deterministic,
                **dict(zip(("dq", "dk", "dv"), into, strict=True)),
            )
        return dq, dk, dv


@contextmanager
def _heads_in_turns(package: ModuleType) -> Iterator[None]:
    """Backward kernels for Hopper that are compiled inside take the order of blocks that the package keeps for
    deterministic ones, and are remembered apart from the others, on disk too.

    The usual order goes through the heads one after the other, each from its longest block to its shortest, and few
    multiprocessors share what is left at the end. This one goes through as many heads at a time as fit in L2, so that
    a call's last blocks are short (benchmarks/attention_blocks.py): of the short calls of context parallelism less is
    lost, and one long call takes what it took.
    """
    hopper: Any = import_module("flash_attn.cute.flash_bwd_sm90")
    backward = package._flash_attn_bwd
    before = hopper.SingleTileScheduler, backward.compile_cache
    hopper.SingleTileScheduler, backward.compile_cache = hopper.SingleTileLPTBwdScheduler, _compiled_in_turns(package)
    try:
        yield
    finally:
        hopper.SingleTileScheduler, backward.compile_cache = before


@cache
def _compiled_in_turns(package: ModuleType) -> Any:
    return package.get_jit_cache("bwd_heads_in_turns")


def _masking(band: Band, packing: Packing) -> dict[str, bool | int | Tensor | None]:
    """The arguments forward and backward share; None is an unbounded side here."""
    bounds = {"window_size_left": band.left, "window_size_right": band.right}
    return {"causal": band.causal, **bounds, **packing_arguments(packing)}
