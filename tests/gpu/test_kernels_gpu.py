"""Every CUDA attention kernel against the reference in fp64, on one GPU.

Errors are relative L2 norms, judged as a ratio to what plain torch loses in the same half precision. FlashAttention-4
compiles each kind of call as it first runs, so its part takes minutes; `-k "not flash_attn_4"` leaves it out.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hk key/value heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from model.kernels import KERNELS, AttentionKernel, AttentionMask, Documents, attention, select_kernel
from model.kernels.math_reference import visible_pairs

pytestmark = pytest.mark.gpu

B = 2
CUDA_KERNELS = ["torch_flash", "flash_attn_2", "flash_attn_4"]
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Sizes are no multiples of any tile; `lengths` are the packed documents."""

    queries: int
    keys: int
    causal: bool = True
    window: int | None = None
    offset: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def mask(self) -> AttentionMask:
        boundaries = [0, *accumulate(self.lengths)]
        documents = Documents.from_boundaries(boundaries, "cuda") if self.lengths else None
        return AttentionMask(self.causal, self.window, self.offset, documents)


PACKED = (1, 127, 1, 211, 2, 170, 509, 3)  # two rows of 512
CASES = {
    "causal": Case(515, 515),
    "full rectangle": Case(301, 515, causal=False),
    "window": Case(515, 515, window=100),
    "window of one": Case(200, 200, window=1),
    "offset rectangle": Case(300, 515, offset=215),
    "offset rectangle, window, late rows empty": Case(400, 260, offset=200, window=150),
    "offset rectangle, early rows empty": Case(401, 390, offset=-130),
    "all empty": Case(64, 64, offset=-64),
    "documents": Case(512, 512, lengths=PACKED),
    "documents, window": Case(512, 512, window=50, lengths=PACKED),
    "documents, full": Case(512, 512, causal=False, lengths=PACKED),
    "documents of one token": Case(16, 16, lengths=(1,) * 32),
}


@pytest.fixture(params=CUDA_KERNELS)
def kernel(request: pytest.FixtureRequest) -> AttentionKernel:
    return runnable(request.param)


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def runnable(name: str) -> AttentionKernel:
    """The kernel; skips where hardware or package is missing and fails where the package is broken."""
    missing = KERNELS[name].availability()
    if missing is not None:
        assert "importing it failed" not in missing, missing
        pytest.skip(f"{name} {missing}")
    return KERNELS[name]


def inputs(case: Case, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, dout."""
    generator = torch.Generator(device="cuda").manual_seed(case.queries + case.keys)

    def draw(length: int, count: int) -> Tensor:
        return torch.randn(B, length, count, head_dim, generator=generator, device="cuda", dtype=dtype)

    q, dout = draw(case.queries, heads[0]), draw(case.queries, heads[0])
    return q, draw(case.keys, heads[1]), draw(case.keys, heads[1]), dout


def run(
    kernel: AttentionKernel,
    tensors: tuple[Tensor, ...],
    mask: AttentionMask,
    deterministic: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """lse and {out, dq, dk, dv}."""
    q, k, v, dout = tensors
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.forward(q, k, v, scale, mask)
    gradients = kernel.backward(dout, q, k, v, out, lse, scale, mask, deterministic)
    return lse, dict(zip(NAMES, (out, *gradients), strict=True))


def in_half_precision(tensors: tuple[Tensor, ...], mask: AttentionMask) -> dict[str, Tensor]:
    """Attention as plain torch does it wholly in the inputs' dtype, by autograd."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[-1] ** -0.5
    visible = visible_pairs(mask, q.shape[0], q.shape[1], k.shape[1], q.device)
    if visible is not None:
        hidden = ~visible.flatten(1, 2) if visible.dim() == 5 else ~visible
        scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    probabilities = scores.softmax(-1)
    if visible is not None:
        probabilities = probabilities.masked_fill(hidden, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, values)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])), strict=True))


def distance(actual: Tensor, exact: Tensor) -> float:
    """Relative L2 error. Where the exact result is 0 (a token alone has no dq), relative to elements of order 1."""
    norm = exact.double().norm().item()
    error = (actual.double() - exact.double()).norm().item()
    return error / (norm if norm > 1e-9 else exact.numel() ** 0.5)


def assert_as_good_as_torch(
    actual: dict[str, Tensor], tensors: tuple[Tensor, ...], mask: AttentionMask, ratio: float = 1.3
) -> None:
    _, exact = run(KERNELS["math"], tuple(x.double() for x in tensors), mask)
    plain = in_half_precision(tensors, mask)
    for name in NAMES:
        assert actual[name].dtype == tensors[0].dtype and actual[name].shape == exact[name].shape, name
        error, torch_error = distance(actual[name], exact[name]), distance(plain[name], exact[name])
        assert error <= ratio * torch_error + 1e-5, f"{name}: error {error:.2e}, plain torch {torch_error:.2e}"


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)], ids=["8:8", "8:2", "8:1"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_is_math(kernel: AttentionKernel, case: Case, heads: tuple[int, int]) -> None:
    tensors, mask = inputs(case, heads, 128, torch.bfloat16), case.mask
    lse, actual = run(kernel, tensors, mask)
    exact_lse, _ = run(KERNELS["math"], tuple(x.double() for x in tensors), mask)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, atol=5e-4, rtol=0)  # -inf equals -inf
    empty = (lse == -math.inf).transpose(1, 2)
    assert (actual["out"][empty] == 0).all() and (actual["dq"][empty] == 0).all()
    assert_as_good_as_torch(actual, tensors, mask)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (96, torch.bfloat16)])
def test_other_widths_and_dtypes(kernel: AttentionKernel, head_dim: int, dtype: torch.dtype) -> None:
    for case in (CASES["causal"], CASES["documents"]):
        tensors, mask = inputs(case, (8, 2), head_dim, dtype), case.mask
        assert_as_good_as_torch(run(kernel, tensors, mask)[1], tensors, mask)


@pytest.mark.parametrize("window", [None, 200])
def test_blocks_of_keys_make_the_whole(kernel: AttentionKernel, window: int | None) -> None:
    """What a ring does: the keys before this rank's queries, then its own; out and lse of both in each backward."""
    size, earlier = 384, 200
    case = Case(size, earlier + size, window=window, offset=earlier)
    q, k, v, dout = inputs(case, (8, 2), 128, torch.bfloat16)
    scale = q.shape[-1] ** -0.5
    blocks = []
    for keys, offset in ((slice(None, earlier), earlier), (slice(earlier, None), 0)):
        blocks.append((k[:, keys], v[:, keys], AttentionMask(window=window, offset=offset)))
    parts = [kernel.forward(q, k, v, scale, mask) for k, v, mask in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in parts]
    out = sum(weight * part.float() for weight, (part, _) in zip(weights, parts, strict=True)).to(q.dtype)
    gradients = [kernel.backward(dout, q, k, v, out, lse, scale, mask) for k, v, mask in blocks]
    dq = sum(gradient[0].float() for gradient in gradients).to(q.dtype)
    dk, dv = (torch.cat([gradient[i] for gradient in gradients], 1) for i in (1, 2))
    whole = dict(zip(NAMES, (out, dq, dk, dv), strict=True))
    assert_as_good_as_torch(whole, (q, k, v, dout), case.mask)


@pytest.mark.parametrize("case", [Case(1000, 1000), Case(1000, 1000, window=300), CASES["documents"]], ids=str)
def test_deterministic_backward_repeats_its_bits(kernel: AttentionKernel, case: Case) -> None:
    tensors, mask = inputs(case, (8, 2), 128, torch.bfloat16), case.mask
    _, first = run(kernel, tensors, mask, deterministic=True)
    for _ in range(4):
        _, again = run(kernel, tensors, mask, deterministic=True)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)
    assert_as_good_as_torch(first, tensors, mask)
    assert not torch.are_deterministic_algorithms_enabled()


def test_views_compute_what_copies_do(kernel: AttentionKernel) -> None:
    """q, k, v cut from one projection, and a [B, H, S, D] gradient."""
    case, mask = CASES["causal"], AttentionMask()
    fused, _, _, _ = inputs(case, (12, 1), 128, torch.bfloat16)
    *_, dout = inputs(case, (8, 1), 128, torch.bfloat16)
    views = *fused.split([8, 2, 2], dim=2), dout.transpose(1, 2).contiguous().transpose(1, 2)
    lse, actual = run(kernel, views, mask, deterministic=True)
    copied_lse, expected = run(kernel, tuple(x.contiguous() for x in views), mask, deterministic=True)
    assert torch.equal(lse, copied_lse) and all(torch.equal(actual[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("name", ["causal", "window", "offset rectangle, window, late rows empty", "documents"])
@pytest.mark.parametrize("kernel_name", [*CUDA_KERNELS, "math"])
def test_host_never_waits(kernel_name: str, name: str) -> None:
    kernel, case = runnable(kernel_name), CASES[name]
    tensors, mask = inputs(case, (8, 2), 128, torch.bfloat16), case.mask
    run(kernel, tensors, mask)  # compiles, loads and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(kernel, tensors, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_is_differentiable(kernel: AttentionKernel) -> None:
    q, k, v, dout = inputs(CASES["causal"], (8, 2), 128, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, kernel=kernel, scale=q.shape[-1] ** -0.5, mask=AttentionMask(), deterministic=True)
    gradients = torch.autograd.grad(out, leaves, dout)
    _, expected = run(kernel, (q, k, v, dout), AttentionMask(), deterministic=True)
    for name, actual in zip(NAMES, (out, *gradients), strict=True):
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_math_in_fp32(case: Case) -> None:
    tensors, mask = inputs(case, (8, 2), 64, torch.float32), case.mask
    _, actual = run(KERNELS["math"], tensors, mask)
    _, exact = run(KERNELS["math"], tuple(x.double() for x in tensors), mask)
    assert all(distance(actual[name], exact[name]) < 1e-5 for name in NAMES)


def test_auto_takes_the_fastest_and_says_why() -> None:
    def choose(dtype: torch.dtype) -> tuple[AttentionKernel, str]:
        return select_kernel("auto", device_type="cuda", dtype=dtype, head_dim=128, window=True, documents=True)

    fastest_first = ["flash_attn_4", "flash_attn_2", "torch_flash", "math"]
    kernel, why = choose(torch.bfloat16)
    assert kernel.name == next(name for name in fastest_first if KERNELS[name].availability() is None), why
    kernel, why = choose(torch.float32)
    assert kernel.name == "math" and why.startswith("WARNING: SLOW ATTENTION")
