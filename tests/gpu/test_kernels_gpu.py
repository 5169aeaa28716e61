"""Every CUDA attention kernel against the reference in fp64, on one GPU.

Errors are relative L2 norms, judged as a ratio to what plain torch loses in the same half precision. FlashAttention-4
compiles each kind of call as it first runs, so its part takes minutes; `-k "not flash_attn_4"` leaves it out.

Shapes: B batch, Sq queries, Sk keys, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from model.kernels import KERNELS, AttentionKernel, AttentionMask, Documents, select_kernel
from model.kernels.math_reference import visible_pairs
from tests.differentiable import attention

pytestmark = pytest.mark.gpu

B = 2
CUDA_KERNELS = ["torch_flash", "flash_attn_2", "cudnn", "flash_attn_3", "flash_attn_4"]
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Sizes are no multiples of any tile; `lengths` are the packed documents, `key_lengths` theirs if they differ."""

    queries: int
    keys: int
    causal: bool = True
    window: int | None = None
    offset: int = 0
    lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()

    @property
    def mask(self) -> AttentionMask:
        documents, key_documents = (
            Documents.from_boundaries([0, *accumulate(lengths)], "cuda") if lengths else None
            for lengths in (self.lengths, self.key_lengths)
        )
        return AttentionMask(self.causal, self.window, self.offset, documents, key_documents)

    def declared_by(self, kernel: AttentionKernel) -> bool:
        why_not = kernel.capabilities.refusal(
            device_type="cuda",
            dtype=torch.bfloat16,
            head_dim=128,
            window=self.window is not None,
            documents=bool(self.lengths),
            rectangular=self.causal and (self.offset != 0 or self.queries != self.keys),
        )
        return why_not is None


PACKED = (1, 127, 1, 211, 2, 170, 509, 3)  # two rows of 512
MORE = (1, 187, 1, 239, 102, 170, 509, 191)  # the same documents with earlier keys: two rows of 700
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
    "more keys": Case(512, 700, lengths=PACKED, key_lengths=MORE),
    "more keys, window": Case(512, 700, window=50, lengths=PACKED, key_lengths=MORE),
    "more keys, full": Case(512, 700, causal=False, lengths=PACKED, key_lengths=MORE),
    "more keys, one query each": Case(8, 300, lengths=(1,) * 16, key_lengths=(1, 2, 30, 67, *(50,) * 4) * 2),
}


def by_kernel_and_case(names: Iterable[str], kernels: Iterable[str] = CUDA_KERNELS) -> pytest.MarkDecorator:
    """Every kernel with every one of these cases that it declares."""
    pairs = [(kernel, name) for kernel in kernels for name in names if CASES[name].declared_by(KERNELS[kernel])]
    values = [pytest.param(kernel, CASES[name], id=f"{kernel}-{name}") for kernel, name in pairs]
    return pytest.mark.parametrize(("kernel", "case"), values, indirect=["kernel"])


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
@by_kernel_and_case(CASES)
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
@by_kernel_and_case(["causal", "documents"])
def test_other_widths_and_dtypes(kernel: AttentionKernel, case: Case, head_dim: int, dtype: torch.dtype) -> None:
    tensors, mask = inputs(case, (8, 2), head_dim, dtype), case.mask
    assert_as_good_as_torch(run(kernel, tensors, mask)[1], tensors, mask)


@pytest.mark.parametrize(
    ("kernel", "window"),
    [(name, window) for name in CUDA_KERNELS for window in (None, 200) if not (window and name == "cudnn")],
    indirect=["kernel"],
)
def test_blocks_of_keys_make_the_whole(kernel: AttentionKernel, window: int | None) -> None:
    """What a ring does: the keys before this rank's queries, then its own; out and lse of both in each backward."""
    size, earlier = 384, 200
    case = Case(size, earlier + size, window=window, offset=earlier)
    q, k, v, dout = inputs(case, (8, 2), 128, torch.bfloat16)
    scale = q.shape[-1] ** -0.5
    blocks = []
    for keys, offset in ((slice(None, earlier), earlier), (slice(earlier, None), 0)):
        # All the earlier keys are visible unless a window hides them: a full rectangle is all that takes.
        causal = offset == 0 or window is not None
        blocks.append((k[:, keys], v[:, keys], AttentionMask(causal, window, offset)))
    parts = [kernel.forward(q, k, v, scale, mask) for k, v, mask in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in parts]
    out = sum(weight * part.float() for weight, (part, _) in zip(weights, parts, strict=True)).to(q.dtype)
    gradients = [kernel.backward(dout, q, k, v, out, lse, scale, mask) for k, v, mask in blocks]
    dq = sum(gradient[0].float() for gradient in gradients).to(q.dtype)
    dk, dv = (torch.cat([gradient[i] for gradient in gradients], 1) for i in (1, 2))
    whole = dict(zip(NAMES, (out, dq, dk, dv), strict=True))
    assert_as_good_as_torch(whole, (q, k, v, dout), case.mask)


@pytest.mark.parametrize(
    "kernel", [name for name in CUDA_KERNELS if KERNELS[name].capabilities.deterministic], indirect=True
)
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
    deterministic = kernel.capabilities.deterministic
    lse, actual = run(kernel, views, mask, deterministic)
    copied_lse, expected = run(kernel, tuple(x.contiguous() for x in views), mask, deterministic)
    assert torch.equal(lse, copied_lse) and torch.equal(actual["out"], expected["out"])
    if deterministic:
        assert all(torch.equal(actual[name], expected[name]) for name in NAMES)
    assert_as_good_as_torch(actual, views, mask)
    # A second layout of dout, and then the first again: nothing may be remembered of either.
    for dout in (views[3].contiguous(), views[3]):
        assert_as_good_as_torch(run(kernel, (*views[:3], dout), mask)[1], views, mask)


def around(like: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """A tensor like this one inside a larger one, and the larger one, all nan."""
    batch, length, heads, width = like.shape
    if place == "heads":
        whole = like.new_full((batch, length, heads + 6, width), math.nan)
        return whole[:, :, 2:-4], whole
    if place == "positions":
        whole = like.new_full((batch, length + 9, heads, width), math.nan)
        return whole[:, 4:-5], whole
    whole = like.new_full((length, 2, batch, heads, width), math.nan)  # as keys and values travel: position first
    return whole[:, 1].transpose(0, 1), whole


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["8:8", "8:2"])
@pytest.mark.parametrize("place", ["heads", "positions", "interleaved"])
@by_kernel_and_case(["causal", "offset rectangle", "offset rectangle, window, late rows empty", "more keys"])
def test_results_are_written_where_they_are_wanted(
    kernel: AttentionKernel, case: Case, place: str, heads: tuple[int, int]
) -> None:
    """Inputs are slices of larger tensors too."""
    tensors, mask = inputs(case, heads, 128, torch.bfloat16), case.mask
    q, k, v, dout = (around(x, place)[0].copy_(x) for x in tensors)
    (out_target, dq, dk, dv), wholes = zip(*(around(x, place) for x in (q, q, k, v)), strict=True)
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.forward(q, k, v, scale, mask, out=out_target)
    gradients = kernel.backward(dout, q, k, v, out, lse, scale, mask, dq=dq, dk=dk, dv=dv)
    assert out is out_target and all(a is b for a, b in zip(gradients, (dq, dk, dv), strict=True))
    assert_as_good_as_torch(dict(zip(NAMES, (out, *gradients), strict=True)), tensors, mask)
    for name, result, whole in zip(NAMES, (out, *gradients), wholes, strict=True):
        assert whole.isnan().sum() == whole.numel() - result.numel(), f"{name} was written outside its place"


# FlashAttention-4 would compile a variant for each.
@pytest.mark.parametrize("kernel", [name for name in CUDA_KERNELS if name != "flash_attn_4"], indirect=True)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (300, 1)])
def test_a_single_query_or_key(kernel: AttentionKernel, queries: int, keys: int) -> None:
    case = Case(queries, keys, causal=False)
    tensors = inputs(case, (8, 2), 128, torch.bfloat16)
    assert_as_good_as_torch(run(kernel, tensors, case.mask)[1], tensors, case.mask)


@by_kernel_and_case(
    ["causal", "window", "offset rectangle, window, late rows empty", "documents", "more keys"], [*CUDA_KERNELS, "math"]
)
def test_host_never_waits(kernel: AttentionKernel, case: Case) -> None:
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
    mask, deterministic = AttentionMask(), kernel.capabilities.deterministic
    out = attention(*leaves, kernel=kernel, scale=q.shape[-1] ** -0.5, mask=mask, deterministic=deterministic)
    gradients = torch.autograd.grad(out, leaves, dout)
    _, expected = run(kernel, (q, k, v, dout), mask, deterministic)
    for name, actual in zip(NAMES, (out, *gradients), strict=True):
        assert torch.equal(actual, expected[name]) or not deterministic, name
    assert_as_good_as_torch(dict(zip(NAMES, (out, *gradients), strict=True)), (q, k, v, dout), mask)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_math_in_fp32(case: Case) -> None:
    tensors, mask = inputs(case, (8, 2), 64, torch.float32), case.mask
    _, actual = run(KERNELS["math"], tensors, mask)
    _, exact = run(KERNELS["math"], tuple(x.double() for x in tensors), mask)
    assert all(distance(actual[name], exact[name]) < 1e-5 for name in NAMES)


def test_auto_takes_the_fastest_and_says_why() -> None:
    def choose(dtype: torch.dtype, masked: bool) -> tuple[AttentionKernel, str]:
        return select_kernel("auto", device_type="cuda", dtype=dtype, head_dim=128, window=masked, documents=masked)

    fastest_first = ["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch_flash", "math"]
    able = [name for name in fastest_first if KERNELS[name].availability() is None]
    kernel, why = choose(torch.bfloat16, masked=False)
    assert kernel.name == able[0], why
    kernel, why = choose(torch.bfloat16, masked=True)
    assert kernel.name == next(name for name in able if name != "cudnn"), why
    kernel, why = choose(torch.float32, masked=True)
    assert kernel.name == "math" and why.startswith("WARNING: SLOW ATTENTION")
