"""What kernels and masks refuse, and in which words."""

from __future__ import annotations

import pytest
import torch

from model.kernels import KERNELS, AttentionMask, Capabilities, Documents, KernelUnavailable
from model.kernels.math_reference import MathKernel
from tests.unit.kernel_cases import CASES, SCALE, Case, documents, inputs


class Modest(MathKernel):
    """Takes squares in fp32 on the CPU and nothing else."""

    name = "modest"
    capabilities = Capabilities(
        device_types=("cpu",),
        dtypes=(torch.float32,),
        window=False,
        documents=False,
        rectangular=False,
        max_head_dim=8,
        head_dim_multiple=2,
        deterministic=False,
    )


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (CASES[0], torch.float64, "takes float32, not float64"),
        (CASES[5], torch.float32, "has no sliding window"),
        (CASES[18], torch.float32, "has no document mask"),
        (CASES[9], torch.float32, "only over as many queries as keys with offset 0"),
        (CASES[13], torch.float32, "only over as many queries as keys with offset 0"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_a_kernel_refuses_what_it_does_not_declare(case: Case, dtype: torch.dtype, message: str) -> None:
    q, k, v, dout = inputs(case, (4, 2), dtype)
    with pytest.raises(KernelUnavailable, match=f"attention kernel modest .*{message}.*kernel math takes"):
        Modest().forward(q, k, v, SCALE, case.mask)
    out, lse = KERNELS["math"].forward(q, k, v, SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match=message):
        Modest().backward(dout, q, k, v, out, lse, SCALE, case.mask)


def test_other_refusals() -> None:
    case = CASES[0]
    q, k, v, dout = inputs(case, (4, 2), torch.float32)
    out, lse = Modest().forward(q, k, v, SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match="has no deterministic backward"):
        Modest().backward(dout, q, k, v, out, lse, SCALE, case.mask, deterministic=True)
    with pytest.raises(KernelUnavailable, match="takes head_dim up to 8, not 12"):
        Modest().forward(*(x.repeat(1, 1, 1, 2) for x in (q, k, v)), SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match="in multiples of 2, not 3"):
        Modest().forward(*(x[..., :3] for x in (q, k, v)), SCALE, case.mask)
    with pytest.raises(KernelUnavailable, match="runs on cuda tensors, not cpu"):
        KERNELS["torch_flash"].forward(q.half(), k.half(), v.half(), SCALE, case.mask)


def test_shapes_that_do_not_fit() -> None:
    q, k, v, _ = inputs(CASES[0], (4, 2))
    kernel = KERNELS["math"]
    with pytest.raises(ValueError, match=r"q \[2, 13, 4, 6\] needs k and v of one shape .* got k \[2, 13, 3, 6\]"):
        kernel.forward(q, k[:, :, [0, 1, 0]], v[:, :, [0, 1, 0]], SCALE, AttentionMask())
    with pytest.raises(ValueError, match="needs k and v of one shape"):
        kernel.forward(q, k, v[:, 1:], SCALE, AttentionMask())
    with pytest.raises(ValueError, match="share dtype and device, got float64, float32, float64"):
        kernel.forward(q, k.float(), v, SCALE, AttentionMask())
    with pytest.raises(ValueError, match="as many queries as keys, got 6 and 13"):
        kernel.forward(q[:, :6], k, v, SCALE, AttentionMask(documents=documents(13, 13)))
    with pytest.raises(ValueError, match="hold 20 tokens but the batch holds 2 x 13 = 26"):
        kernel.forward(q, k, v, SCALE, AttentionMask(documents=documents(13, 7)))
    with pytest.raises(ValueError, match="crosses position 13"):
        kernel.forward(q, k, v, SCALE, AttentionMask(documents=documents(12, 14)))


def test_targets_that_do_not_fit() -> None:
    q, k, v, dout = inputs(CASES[0], (4, 2))
    kernel, mask = KERNELS["math"], AttentionMask()
    with pytest.raises(ValueError, match=r"out must be \[2, 13, 4, 6\] float64 on cpu, got \[2, 12, 4, 6\] float64"):
        kernel.forward(q, k, v, SCALE, mask, out=torch.empty_like(q[:, 1:]))
    with pytest.raises(ValueError, match="out must be .* float64 on cpu, got .* float32 on cpu"):
        kernel.forward(q, k, v, SCALE, mask, out=q.float())
    out, lse = kernel.forward(q, k, v, SCALE, mask)
    with pytest.raises(ValueError, match="dv must be contiguous in its last dimension, its stride there is 26"):
        sideways = v.transpose(1, 3).contiguous().transpose(1, 3)
        kernel.backward(dout, q, k, v, out, lse, SCALE, mask, dv=sideways)
    with pytest.raises(ValueError, match="dk must be"):
        kernel.backward(dout, q, k, v, out, lse, SCALE, mask, dk=torch.empty_like(q))


def test_key_documents_that_do_not_fit() -> None:
    q, k, v, _ = inputs(Case("", 6, 13, AttentionMask()), (4, 2))

    def forward(lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> None:
        mask = AttentionMask(documents=documents(*lengths), key_documents=documents(*key_lengths))
        KERNELS["math"].forward(q, k, v, SCALE, mask)

    forward((6, 6), (13, 13))
    with pytest.raises(ValueError, match="key_documents need documents"):
        AttentionMask(key_documents=documents(2))
    with pytest.raises(ValueError, match="offset 0, got 1"):
        AttentionMask(offset=1, documents=documents(2), key_documents=documents(3))
    with pytest.raises(ValueError, match="a key document for each of 2, got 3"):
        forward((6, 6), (13, 12, 1))
    with pytest.raises(ValueError, match="document 1 has 4 queries but 3 keys"):
        forward((2, 4, 6), (10, 3, 13))
    with pytest.raises(ValueError, match="hold 25 tokens but the batch holds 2 x 13 = 26"):
        forward((6, 6), (13, 12))
    with pytest.raises(ValueError, match="hold 11 tokens but the batch holds 2 x 6 = 12"):
        forward((6, 5), (13, 13))
    with pytest.raises(ValueError, match="crosses position 13"):
        forward((6, 6), (12, 14))
    with pytest.raises(ValueError, match="the first 1 rows hold 1 documents of queries but 2 of keys"):
        forward((6, 5, 1), (7, 6, 13))


def test_masks_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"window \(0\) must be at least 1"):
        AttentionMask(window=0)
    with pytest.raises(ValueError, match="offset 0, got 3"):
        AttentionMask(offset=3, documents=documents(2))
    for boundaries in ([], [0], [1, 2], [0, 2, 2], [0, 3, 2]):
        with pytest.raises(ValueError, match="must rise strictly from 0"):
            Documents.from_boundaries(boundaries, "cpu")
