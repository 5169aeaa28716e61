"""The CUDA adapters on the CPU, against stand-ins for the packages they call (`flash_stand_ins`).

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace
from typing import Any

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
from model.kernels.banded import Band, BandedKernel, direct
from tests.unit.flash_stand_ins import (
    cudnn_backward,
    cudnn_forward,
    fa2,
    fa3,
    fa4,
    handed,
    torch_backward,
    torch_forward,
)

SCALE = 0.4


@pytest.fixture(params=["torch_flash", "flash_attn_2", "flash_attn_3", "flash_attn_4"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    """The adapter over its stand-in, allowed fp64 on the CPU."""
    monkeypatch.setattr(flash_attn_2.FlashAttn2Kernel, "package", fa2())
    monkeypatch.setattr(flash_attn_3.FlashAttn3Kernel, "package", fa3())
    monkeypatch.setattr(flash_attn_4.FlashAttn4Kernel, "package", fa4())
    monkeypatch.setattr(flash_attn_4, "_heads_in_turns", nullcontext)
    monkeypatch.setattr(torch_flash, "_forward_op", torch_forward)
    monkeypatch.setattr(torch_flash, "_backward_op", torch_backward)
    chosen = KERNELS[request.param]
    assert isinstance(chosen, BandedKernel)
    anywhere = Capabilities(device_types=("cpu",), dtypes=(torch.float64,))
    monkeypatch.setattr(chosen, "capabilities", anywhere)
    return chosen


def test_flash_attn_4_takes_heads_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's other order of blocks, and another place for what is compiled, during its backward alone."""
    hopper = SimpleNamespace(SingleTileScheduler="one head", SingleTileLPTBwdScheduler="heads in turns")
    seen = []

    def backward(*tensors: Tensor, **how: object) -> tuple[Tensor, ...]:
        seen.append((hopper.SingleTileScheduler, package._flash_attn_bwd.compile_cache))
        if len(seen) == 3:
            raise RuntimeError("out of memory")
        return tensors[:3]

    package: Any = ModuleType("package")
    package._flash_attn_bwd, package.get_jit_cache = backward, lambda name: [name]
    package._flash_attn_bwd.compile_cache = "as usual"
    monkeypatch.setitem(sys.modules, "flash_attn.cute.flash_bwd_sm90", hopper)
    monkeypatch.setattr(flash_attn_4.FlashAttn4Kernel, "package", package)
    tensors: Any = tuple(torch.zeros(1, 8, 1, 8) for _ in range(6))
    kernel = flash_attn_4.FlashAttn4Kernel()
    for call in range(3):
        with pytest.raises(RuntimeError) if call == 2 else nullcontext():
            kernel._band_backward(tensors, SCALE, Band(None, 0), None, False, (None, None, None))
        assert (hopper.SingleTileScheduler, package._flash_attn_bwd.compile_cache) == ("one head", "as usual")
    assert seen == [("heads in turns", ["bwd_heads_in_turns"])] * 3
    assert seen[0][1] is seen[1][1], "compiled once"


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


def test_only_rows_of_16_bytes_are_written_directly() -> None:
    whole = torch.zeros(2, 6, 4, 32, dtype=torch.bfloat16)
    for target in (whole, whole[:, 1:3], whole[:, :, 1:], whole.transpose(0, 1)):
        assert direct(target) is target
    odd = torch.zeros(1 + whole.numel(), dtype=torch.bfloat16)[1:].view_as(whole)
    for target in (odd, whole[..., ::2], whole[..., 4:20], torch.zeros(2, 6, 4, 12, dtype=torch.bfloat16)):
        assert direct(target) is None
    assert direct(None) is None


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
