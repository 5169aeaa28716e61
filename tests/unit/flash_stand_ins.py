"""Stand-ins for the packages that the CUDA adapters call, to try the adapters on the CPU.

Each takes the real function's parameters by name and order and computes flash-attention's documented meaning: query i
sees key j if -left <= j - i - (Sk - Sq) <= right, -1 or None unbounded, causal is right = 0. It insists on what the
real one silently assumes (contiguous lse, no empty row, 16-byte steps between the heads it writes). What only hardware
shows is in tests/gpu.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim, T packed tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TypeAlias

import torch
from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, right: int) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] by flash-attention's meaning, fp64 -> out, lse [B, H, Sq]."""
    shift = k.shape[1] - q.shape[1]
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - shift
    right = 0 if causal else right
    visible = (ahead >= -left if left >= 0 else True) & (ahead <= right if right >= 0 else True)
    visible = torch.as_tensor(visible).expand(ahead.shape)
    assert visible.any(1).all(), "backends disagree about empty rows: none may reach them"
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~visible, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


Cuts: TypeAlias = tuple[Tensor | None, Tensor | None]
"""cu_seqlens of the queries and of the keys."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, right: int, cuts: Cuts
) -> tuple[Tensor, Tensor]:
    """out and lse in the kernels' dtypes; with cuts [T, H, D] and lse [H, T]."""
    if cuts[0] is None or cuts[1] is None:
        assert cuts == (None, None)
        out, lse = dense(q, k, v, scale, causal, left, right)
        return out, lse.contiguous()
    lengths, key_lengths = (cut.diff().tolist() for cut in cuts if cut is not None)
    parts = [
        dense(q[None], k[None], v[None], scale, causal, left, right)
        for q, k, v in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *how: object
) -> tuple[Tensor, ...]:
    """Autograd of `forward`, after checking that out and lse are its own."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        own_out, own_lse = forward(*leaves, *how)  # type: ignore[arg-type]
    assert lse.is_contiguous() and torch.allclose(lse, own_lse) and torch.allclose(out, own_out)
    return torch.autograd.grad(own_out, leaves, dout)


def longest(cuts: Cuts) -> tuple[Tensor | None, ...]:
    return tuple(None if cut is None else cut.diff().max() for cut in cuts)


handed: list[int] = []
"""Addresses of the tensors that a stand-in was given to write to."""


def write(target: Tensor | None, result: Tensor) -> Tensor:
    if target is None:
        return result
    assert target.shape == result.shape and target.stride(-1) == 1 and target.data_ptr() % 16 == 0
    assert all(stride * target.element_size() % 16 == 0 for stride in target.stride()[:-1])
    handed.append(target.data_ptr())
    return target.copy_(result)


# The parameters stand as in the packages, several to a line.
# fmt: off
def fa2() -> SimpleNamespace:
    """flash_attn.flash_attn_interface 2.8.3."""

    def _fwd(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax
    ):
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        out, lse = forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, (None, None))
        return out, lse, None, None

    def _varlen_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False
    ):
        cuts = cu_seqlens_q, cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == longest(cuts)
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        out, lse = forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, cuts)
        return out, lse, None, None

    def _bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, cuts=(None, None)
    ):
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, True)
        how = softmax_scale, causal, window_size_left, window_size_right, cuts
        for buffer, gradient in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *how), strict=True):
            write(buffer, gradient)

    def _varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic
    ):
        cuts = cu_seqlens_q, cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == longest(cuts)
        _bwd(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, alibi_slopes, deterministic, cuts
        )

    return SimpleNamespace(
        _wrapped_flash_attn_forward=_fwd,
        _wrapped_flash_attn_backward=_bwd,
        _wrapped_flash_attn_varlen_forward=_varlen_fwd,
        _wrapped_flash_attn_varlen_backward=_varlen_bwd,
    )


def fa3() -> SimpleNamespace:
    """flash_attn_interface of FlashAttention-3, the parameters in use."""

    def _fwd(
        q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=-1, window_size_right=-1
    ):
        cuts = cu_seqlens_q, cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == longest(cuts)
        out, lse = forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, cuts)
        return out, lse, None, None

    def _bwd(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False
    ):
        cuts = cu_seqlens_q, cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == longest(cuts) and deterministic and sequed_q is sequed_k is None
        how = softmax_scale, is_causal, window_size_left, window_size_right, cuts
        gradients = backward(dout, q, k, v, out, softmax_lse, *how)
        for buffer, gradient in zip((dq, dk, dv), gradients, strict=True):
            write(buffer, gradient)

    return SimpleNamespace(_flash_attn_forward=_fwd, _flash_attn_backward=_bwd)


def fa4() -> SimpleNamespace:
    """flash_attn.cute.interface 4.0.0b36, the parameters in use."""

    def sides(left: int | None, right: int | None) -> tuple[int, int]:
        return -1 if left is None else left, -1 if right is None else right

    def _fwd(
        q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=None, window_size_right=None, return_lse=False, out=None
    ):
        cuts = cu_seqlens_q, cu_seqlens_k
        assert return_lse and (max_seqlen_q, max_seqlen_k) == longest(cuts)
        window = sides(window_size_left, window_size_right)
        result, lse = forward(q, k, v, softmax_scale, causal, *window, cuts)
        return write(out, result), lse, None, None, None

    def _bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dq=None, dk=None, dv=None
    ):
        cuts = cu_seqlens_q, cu_seqlens_k
        assert deterministic and (max_seqlen_q, max_seqlen_k) == longest(cuts)
        window = sides(window_size_left, window_size_right)
        gradients = backward(dout, q, k, v, out, lse, softmax_scale, causal, *window, cuts)
        return tuple(map(write, (dq, dk, dv), gradients))

    return SimpleNamespace(_flash_attn_fwd=_fwd, _flash_attn_bwd=_bwd)


def torch_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None
):
    """aten::_flash_attention_forward."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    cuts = cum_seq_q, cum_seq_k
    assert (max_q, max_k) == ((query.shape[1], key.shape[1]) if cum_seq_q is None else longest(cuts))
    out, lse = forward(query, key, value, scale, is_causal, window_size_left, window_size_right, cuts)
    return out, lse, None, None, None


def torch_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None
):
    """aten::_flash_attention_backward, which is deterministic by torch's global switch."""
    assert torch.are_deterministic_algorithms_enabled()
    cuts = cum_seq_q, cum_seq_k
    assert (max_q, max_k) == ((query.shape[1], key.shape[1]) if cum_seq_q is None else longest(cuts))
    assert rng_state.dtype == torch.uint64 and unused.numel() == 0 and dropout_p == 0.0
    how = scale, is_causal, window_size_left, window_size_right, cuts
    return backward(grad_out, query, key, value, out, logsumexp, *how)


def cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None
):
    """aten::_scaled_dot_product_cudnn_attention: heads first, causal from the top left, lse [B, H, Sq, 1]."""
    assert attn_bias is None and compute_log_sumexp and (dropout_p, return_debug_mask) == (0.0, False)
    assert query.shape[2] > 1 and key.shape[2] > 1 and not (is_causal and query.shape[2] != key.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = forward(q, k, v, scale, is_causal, -1, -1, (None, None))
    return out.transpose(1, 2), lse[..., None], *(None,) * 7


def cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None
):
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0.0)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert (max_q, max_k) == (query.shape[2], key.shape[2]) and min(max_q, max_k) > 1
    # The plan that cuDNN is given depends on these strides, but torch does not look for it by them.
    assert all(x.transpose(1, 2).is_contiguous() for x in (grad_out, out))
    dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    gradients = backward(dout, q, k, v, out, logsumexp.squeeze(-1), scale, is_causal, -1, -1, (None, None))
    return tuple(x.transpose(1, 2) for x in gradients)


# fmt: on
