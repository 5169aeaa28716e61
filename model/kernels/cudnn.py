"""Backend `cudnn`: the attention of the cuDNN that CUDA builds of torch include; needs no package.

torch uses only part of cuDNN: no window, the causal triangle that starts at the top left only, and ragged batches as an
experiment behind an environment variable. A bias would allow any mask, but as a matrix of Sq x Sk whose hidden tiles
are computed all the same. So this backend takes full rectangles and causal squares. It declares no deterministic
backward, because torch itself calls this attention non-deterministic.

cuDNN builds a plan for each new combination of shapes and strides (a fraction of a second), so lengths should not vary.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.banded import Band, BandedKernel, Packing, Tensors, unit_stride
from model.kernels.cuda import missing_gpu
from model.kernels.mask import AttentionMask
from model.kernels.math_reference import MathKernel
from model.kernels.protocol import Capabilities, Gradients, Targets

_forward_op = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward_op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_OLDEST_CUDNN = 90000
_math = MathKernel()


class CudnnKernel(BandedKernel):
    """aten::_scaled_dot_product_cudnn_attention and its backward (torch 2.11 and later)."""

    name = "cudnn"
    # Hopper alone goes beyond a width of 128, with late versions.
    capabilities = Capabilities(
        device_types=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        window=False,
        documents=False,
        rectangular=False,
        max_head_dim=128,
        head_dim_multiple=8,
        deterministic=False,
    )

    def availability(self) -> str | None:
        missing = missing_gpu((8, 9, 10, 12))
        if missing is not None:
            return missing
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if version is None:
            return f"needs a torch built with cuDNN, this one ({torch.__version__}) is not"
        if version < _OLDEST_CUDNN:
            return f"needs cuDNN {_OLDEST_CUDNN} or later, torch loads {version}"
        return None

    def _band_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band, packing: Packing, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        del target  # the operator makes its own
        assert packing is None
        if _too_short(q, k):
            return _math.forward(q, k, v, scale, AttentionMask(causal=False))
        out, lse, *_ = _forward_op(
            *(_heads_first(unit_stride(x)) for x in (q, k, v)),
            None,  # bias
            True,  # log-sum-exp wanted
            0.0,  # dropout
            _is_causal(band, q, k),
            False,  # no debug mask
            scale=scale,
        )
        return out.transpose(1, 2), lse.squeeze(-1)

    def _band_backward(
        self, tensors: Tensors, scale: float, band: Band, packing: Packing, deterministic: bool, targets: Targets
    ) -> Gradients:
        del targets  # the operator makes its own
        assert packing is None and not deterministic
        dout, q, k, v, out, lse = tensors
        if _too_short(q, k):
            return _math.backward(dout, q, k, v, out, lse, scale, AttentionMask(causal=False))
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # seed and offset, read only under dropout
        # torch finds a plan by the strides of q, k and v alone, yet builds it for those of dout and out as well: only
        # one layout of these two may ever reach it.
        dq, dk, dv = _backward_op(
            _heads_first(dout.contiguous()),
            *(_heads_first(unit_stride(x)) for x in (q, k, v)),
            _heads_first(out.contiguous()),
            lse.unsqueeze(-1),
            unused,
            unused,
            None,  # bias; None stands for the schema's undefined tensor, here and below
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,  # dropout
            _is_causal(band, q, k),
            scale=scale,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _is_causal(band: Band, q: Tensor, k: Tensor) -> bool:
    assert band.left is None and (band.right is None or (band.causal and q.shape[1] == k.shape[1])), band
    return band.causal


def _too_short(q: Tensor, k: Tensor) -> bool:
    """cuDNN takes no single key, and its backward no single query. What is seen then is a full row or column."""
    return q.shape[1] == 1 or k.shape[1] == 1
