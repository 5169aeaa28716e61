"""The CUDA adapters on the CPU, against stand-ins for the packages they call.

Each stand-in takes the real function's parameters by name and order and computes flash-attention's documented meaning:
query i sees key j if -left <= j - i - (Sk - Sq) <= right, -1 or None unbounded, causal is right = 0. It insists on what
the real one silently assumes (contiguous lse, no empty row). What only hardware shows is in tests/gpu.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads, D head width, T packed tokens.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.kernels import (
    KERNELS,
    AttentionKernel,
    AttentionMask,
    Capabilities,
    Documents,
    flash_attn_2,
    flash_attn_4,
    torch_flash,
)
from model.kernels.banded import BandedKernel

SCALE = 0.4


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


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, right: int, cuts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and lse in the kernels' dtypes; with cuts [T, H, D] and lse [H, T]."""
    if cuts is None:
        out, lse = dense(q, k, v, scale, causal, left, right)
        return out, lse.contiguous()
    lengths = cuts.diff().tolist()
    parts = [
        dense(q[None], k[None], v[None], scale, causal, left, right)
        for q, k, v in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
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


# The parameters stand as in the packages, several to a line.
# fmt: off
def fa2() -> SimpleNamespace:
    """flash_attn.flash_attn_interface 2.8.3."""

    def _fwd(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax
    ):
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        out, lse = forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, None)
        return out, lse, None, None

    def _varlen_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        out, lse = forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, cu_seqlens_q)
        return out, lse, None, None

    def _bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, cuts=None
    ):
        assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, True)
        how = softmax_scale, causal, window_size_left, window_size_right, cuts
        for buffer, gradient in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *how), strict=True):
            assert buffer.is_contiguous()
            buffer.copy_(gradient)

    def _varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        _bwd(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, alibi_slopes, deterministic, cu_seqlens_q
        )

    return SimpleNamespace(
        _wrapped_flash_attn_forward=_fwd,
        _wrapped_flash_attn_backward=_bwd,
        _wrapped_flash_attn_varlen_forward=_varlen_fwd,
        _wrapped_flash_attn_varlen_backward=_varlen_bwd,
    )


def fa4() -> SimpleNamespace:
    """flash_attn.cute.interface 4.0.0b36, the parameters in use."""

    def sides(left: int | None, right: int | None) -> tuple[int, int]:
        return -1 if left is None else left, -1 if right is None else right

    def _fwd(
        q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=None, window_size_right=None, return_lse=False
    ):
        assert return_lse and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        window = sides(window_size_left, window_size_right)
        return *forward(q, k, v, softmax_scale, causal, *window, cu_seqlens_q), None, None, None

    def _bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False
    ):
        assert deterministic and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        window = sides(window_size_left, window_size_right)
        return backward(dout, q, k, v, out, lse, softmax_scale, causal, *window, cu_seqlens_q)

    return SimpleNamespace(_flash_attn_fwd=_fwd, _flash_attn_bwd=_bwd)


def torch_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None
):
    """aten::_flash_attention_forward."""
    assert cum_seq_q is cum_seq_k and (dropout_p, return_debug_mask) == (0.0, False)
    assert (max_q, max_k) == ((query.shape[1], key.shape[1]) if cum_seq_q is None else (cum_seq_q.diff().max(),) * 2)
    out, lse = forward(query, key, value, scale, is_causal, window_size_left, window_size_right, cum_seq_q)
    return out, lse, None, None, None


def torch_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None
):
    """aten::_flash_attention_backward, which is deterministic by torch's global switch."""
    assert torch.are_deterministic_algorithms_enabled()
    assert cum_seq_q is cum_seq_k and dropout_p == 0.0
    assert rng_state.dtype == torch.uint64 and unused.numel() == 0
    how = scale, is_causal, window_size_left, window_size_right, cum_seq_q
    return backward(grad_out, query, key, value, out, logsumexp, *how)


# fmt: on
@pytest.fixture(params=["torch_flash", "flash_attn_2", "flash_attn_4"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    """The adapter over its stand-in, allowed fp64 on the CPU."""
    monkeypatch.setattr(flash_attn_2, "_package", fa2)
    monkeypatch.setattr(flash_attn_4, "_package", fa4)
    monkeypatch.setattr(torch_flash, "_forward_op", torch_forward)
    monkeypatch.setattr(torch_flash, "_backward_op", torch_backward)
    chosen = KERNELS[request.param]
    assert isinstance(chosen, BandedKernel)
    anywhere = Capabilities(device_types=("cpu",), dtypes=(torch.float64,))
    monkeypatch.setattr(chosen, "capabilities", anywhere)
    return chosen


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["4:4", "4:1"])
@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [
        (7, 7, AttentionMask()),
        (5, 9, AttentionMask(causal=False)),
        (9, 5, AttentionMask(causal=False)),
        (7, 7, AttentionMask(window=3)),
        (7, 7, AttentionMask(window=1)),
        (7, 7, AttentionMask(causal=False, window=3)),
        (7, 7, AttentionMask(offset=7, window=4)),
        (7, 7, AttentionMask(offset=7, window=10)),
        (5, 8, AttentionMask(offset=1)),
        (5, 8, AttentionMask(offset=-2)),
        (8, 5, AttentionMask(offset=-2, window=3)),
        (5, 5, AttentionMask(offset=-5)),
        (7, 7, AttentionMask(documents=Documents.from_boundaries([0, 1, 3, 7, 12, 14], "cpu"))),
        (7, 7, AttentionMask(window=3, documents=Documents.from_boundaries([0, 1, 3, 7, 12, 14], "cpu"))),
        (7, 7, AttentionMask(causal=False, documents=Documents.from_boundaries([0, 7, 14], "cpu"))),
    ],
    ids=str,
)
def test_adapter_is_math(
    kernel: AttentionKernel, heads: tuple[int, int], queries: int, keys: int, mask: AttentionMask
) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int, count: int) -> Tensor:
        return torch.randn(2, length, count, 8, generator=generator, dtype=torch.float64)

    q, k, v, dout = draw(queries, heads[0]), draw(keys, heads[1]), draw(keys, heads[1]), draw(queries, heads[0])
    results = []
    for each in (kernel, KERNELS["math"]):
        out, lse = each.forward(q, k, v, SCALE, mask)
        results.append((out, lse, *each.backward(dout, q, k, v, out, lse, SCALE, mask, deterministic=True)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert not torch.are_deterministic_algorithms_enabled()


def test_flash_attn_2_alone_does_not_pass_for_4(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flash_attn_4, "version", absent)
    package, why = flash_attn_4._load.__wrapped__()
    assert package is None and why.startswith("needs the package flash-attn-4, which is not installed; pip install")
    # Installed, but flash-attn 2 came later and put its old module back: there the backward knows no sink.
    monkeypatch.setattr(flash_attn_4, "version", lambda name: "4.0.0b36")
    old = SimpleNamespace(_flash_attn_bwd=lambda q, k, v: None, __file__="/site/flash_attn/cute/interface.py")
    monkeypatch.setattr(flash_attn_4, "import_or_reason", lambda module, remedy: (old, ""))
    package, why = flash_attn_4._load.__wrapped__()
    assert package is None and "flash-attn 2's old copy" in why and old.__file__ in why


def test_an_older_flash_attn_2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn_2, "import_or_reason", lambda module, remedy: (SimpleNamespace(), ""))
    package, why = flash_attn_2._load.__wrapped__()
    assert package is None and "needs flash-attn 2.8, the installed one lacks _wrapped_flash_attn_forward" in why
