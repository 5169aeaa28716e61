"""The CUDA adapters on the CPU, against stand-ins for the packages they call.

Each stand-in takes the real function's parameters by name and order and computes flash-attention's documented meaning:
query i sees key j if -left <= j - i - (Sk - Sq) <= right, -1 or None unbounded, causal is right = 0. It insists on what
the real one silently assumes (contiguous lse, no empty row, 16-byte steps between the heads it writes). What only
hardware shows is in tests/gpu.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads, D head width, T packed tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from model.kernels import (
    KERNELS,
    AttentionKernel,
    AttentionMask,
    Capabilities,
    Documents,
    KernelUnavailable,
    cudnn,
    flash_attn_2,
    flash_attn_3,
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
@pytest.fixture(params=["torch_flash", "flash_attn_2", "flash_attn_3", "flash_attn_4"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    """The adapter over its stand-in, allowed fp64 on the CPU."""
    monkeypatch.setattr(flash_attn_2, "_package", fa2)
    monkeypatch.setattr(flash_attn_3, "_package", fa3)
    monkeypatch.setattr(flash_attn_4, "_package", fa4)
    monkeypatch.setattr(torch_flash, "_forward_op", torch_forward)
    monkeypatch.setattr(torch_flash, "_backward_op", torch_backward)
    chosen = KERNELS[request.param]
    assert isinstance(chosen, BandedKernel)
    anywhere = Capabilities(device_types=("cpu",), dtypes=(torch.float64,))
    monkeypatch.setattr(chosen, "capabilities", anywhere)
    return chosen


QUERIES = Documents.from_boundaries([0, 1, 3, 7, 12, 14], "cpu")
KEYS = Documents.from_boundaries([0, 4, 7, 11, 16, 22], "cpu")
"""Of the same documents, in rows of 11."""
by_heads = pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["4:4", "4:1"])
by_mask = pytest.mark.parametrize(
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
        (7, 7, AttentionMask(documents=QUERIES)),
        (7, 7, AttentionMask(window=3, documents=QUERIES)),
        (7, 7, AttentionMask(causal=False, documents=Documents.from_boundaries([0, 7, 14], "cpu"))),
        (7, 11, AttentionMask(documents=QUERIES, key_documents=KEYS)),
        (7, 11, AttentionMask(window=5, documents=QUERIES, key_documents=KEYS)),
        (7, 11, AttentionMask(causal=False, documents=QUERIES, key_documents=KEYS)),
    ],
    ids=str,
)


def draw(heads: tuple[int, int], queries: int, keys: int) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return tuple(torch.randn(2, *shape, 8, generator=generator, dtype=torch.float64) for shape in shapes)


@by_heads
@by_mask
def test_adapter_is_math(
    kernel: AttentionKernel, heads: tuple[int, int], queries: int, keys: int, mask: AttentionMask
) -> None:
    q, k, v, dout = draw(heads, queries, keys)
    results = []
    for each in (kernel, KERNELS["math"]):
        out, lse = each.forward(q, k, v, SCALE, mask)
        results.append((out, lse, *each.backward(dout, q, k, v, out, lse, SCALE, mask, deterministic=True)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert not torch.are_deterministic_algorithms_enabled()


WRITES = {
    "flash_attn_4": ("out", "dq", "dk", "dv"),
    "flash_attn_3": ("dq", "dk", "dv"),
    "flash_attn_2": ("dq", "dk", "dv"),
    "torch_flash": (),
}
"""What a backend's own interface can write in place."""


@pytest.mark.parametrize("alignment", ["aligned", "odd steps", "odd start"])
@by_heads
@by_mask
def test_adapter_writes_where_it_is_wanted(
    kernel: AttentionKernel, heads: tuple[int, int], queries: int, keys: int, mask: AttentionMask, alignment: str
) -> None:
    """Into slices of heads, by the backend itself where it can and its stores are aligned, else by a copy."""
    q, k, v, dout = draw(heads, queries, keys)
    width, start = 8 + (alignment == "odd steps"), int(alignment == "odd start")
    shapes = [(*x.shape[:2], x.shape[2] + 2, width) for x in (q, q, k, v)]
    arounds = [q.new_full((math.prod(shape) + start,), math.nan)[start:].view(shape) for shape in shapes]
    targets = dict(zip(("out", "dq", "dk", "dv"), (x[:, :, 1:-1, -8:] for x in arounds), strict=True))
    handed.clear()
    out, lse = kernel.forward(q, k, v, SCALE, mask, out=targets["out"])
    into = {name: target for name, target in targets.items() if name != "out"}
    gradients = kernel.backward(dout, q, k, v, out, lse, SCALE, mask, deterministic=True, **into)
    expected, expected_lse = KERNELS["math"].forward(q, k, v, SCALE, mask)
    exact = expected, *KERNELS["math"].backward(dout, q, k, v, expected, expected_lse, SCALE, mask)
    for name, actual, right, around in zip(targets, (out, *gradients), exact, arounds, strict=True):
        assert actual is targets[name], name
        torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-12)
        assert around.isnan().sum() == around.numel() - actual.numel(), name
    inside = {
        name: any(at.data_ptr() <= address <= at[-1, -1, -1, -1:].data_ptr() for address in handed)
        for name, at in targets.items()
    }
    possible = alignment == "aligned" and mask.offset != -5  # where nothing is visible nothing is called
    assert inside == {name: name in WRITES[kernel.name] and possible for name in targets}


@pytest.fixture
def over_cudnn(monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    """The adapter over its stand-in with its own refusals, allowed fp64 on the CPU."""
    monkeypatch.setattr(cudnn, "_forward_op", cudnn_forward)
    monkeypatch.setattr(cudnn, "_backward_op", cudnn_backward)
    kernel = KERNELS["cudnn"]
    allowed = replace(kernel.capabilities, device_types=("cpu",), dtypes=(torch.float64,))
    monkeypatch.setattr(kernel, "capabilities", allowed)
    return kernel


@by_heads
@pytest.mark.parametrize("place", ["nowhere", "in slices"])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(7, 7, True), (7, 7, False), (5, 9, False), (9, 5, False), (1, 1, True), (1, 6, False), (6, 1, False)],
)
def test_cudnn_is_math(
    over_cudnn: AttentionKernel, queries: int, keys: int, causal: bool, place: str, heads: tuple[int, int]
) -> None:
    """Any strides; a single query or key does not reach cuDNN."""
    kernel, mask = over_cudnn, AttentionMask(causal=causal)
    q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(heads, queries, keys))
    targets = [x.new_full((*x.shape[:2], x.shape[2] + 2, 8), math.nan)[:, :, 1:-1] for x in (q, q, k, v)]
    out_target, dq, dk, dv = targets if place == "in slices" else (None,) * 4
    out, lse = kernel.forward(q, k, v, SCALE, mask, out=out_target)
    gradients = kernel.backward(dout, q, k, v, out, lse, SCALE, mask, dq=dq, dk=dk, dv=dv)
    expected, expected_lse = KERNELS["math"].forward(q, k, v, SCALE, mask)
    exact = expected, expected_lse, *KERNELS["math"].backward(dout, q, k, v, expected, expected_lse, SCALE, mask)
    for actual, right in zip((out, lse, *gradients), exact, strict=True):
        torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (AttentionMask(window=3), "has no sliding window"),
        (AttentionMask(documents=Documents.from_boundaries([0, 7, 14], "cpu")), "has no document mask"),
        (AttentionMask(offset=2), "takes a causal mask only over as many queries as keys with offset 0"),
    ],
    ids=str,
)
def test_cudnn_refuses_what_torch_does_not_ask_of_it(
    over_cudnn: AttentionKernel, mask: AttentionMask, words: str
) -> None:
    q, k, v, dout = draw((4, 4), 7, 7)
    with pytest.raises(KernelUnavailable, match=f"attention kernel cudnn {words}"):
        over_cudnn.forward(q, k, v, SCALE, mask)
    lse = q.new_zeros(2, 4, 7)
    with pytest.raises(KernelUnavailable, match="cudnn has no deterministic backward"):
        over_cudnn.backward(dout, q, k, v, q, lse, SCALE, AttentionMask(), deterministic=True)


def test_flash_attn_3_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    package, why = flash_attn_3._load.__wrapped__()
    assert package is None and why.startswith("needs flash_attn_interface, which is not installed; it is not on PyPI")
    assert "#subdirectory=hopper" in why
    monkeypatch.setattr(flash_attn_3, "import_or_reason", lambda module, remedy: (fa3(), ""))
    package, why = flash_attn_3._load.__wrapped__()
    assert package is None and "before _flash_attn_forward, _flash_attn_backward became custom operators" in why
    modern = SimpleNamespace(register_autograd=None)
    both = SimpleNamespace(_flash_attn_forward=modern, _flash_attn_backward=modern)
    monkeypatch.setattr(flash_attn_3, "import_or_reason", lambda module, remedy: (both, ""))
    assert flash_attn_3._load.__wrapped__() == (both, "")


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
