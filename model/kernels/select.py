"""Chooses the attention kernel: by name, or the fastest that can run."""

from __future__ import annotations

import torch

from model.kernels.cpu import CpuKernel
from model.kernels.cudnn import CudnnKernel
from model.kernels.flash_attn_2 import FlashAttn2Kernel
from model.kernels.flash_attn_3 import FlashAttn3Kernel
from model.kernels.flash_attn_4 import FlashAttn4Kernel
from model.kernels.math_reference import MathKernel
from model.kernels.protocol import AttentionKernel, KernelUnavailable
from model.kernels.torch_flash import TorchFlashKernel

# Fastest first. flash_attn_4 and flash_attn_2 as measured on an H200 (docs/ring_attention.md); the others stand where
# their authors' figures put them.
_FASTEST_FIRST: tuple[AttentionKernel, ...] = (
    FlashAttn4Kernel(),
    FlashAttn3Kernel(),
    CudnnKernel(),
    FlashAttn2Kernel(),
    TorchFlashKernel(),
    CpuKernel(),
    MathKernel(),
)
KERNELS: dict[str, AttentionKernel] = {kernel.name: kernel for kernel in _FASTEST_FIRST}
BACKENDS: tuple[str, ...] = ("auto", *KERNELS)


def select_kernel(
    backend: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    window: bool,
    documents: bool,
    rectangular: bool = False,
    deterministic: bool = False,
) -> tuple[AttentionKernel, str]:
    """The kernel that `backend` names, or for "auto" the fastest that is installed and takes what is asked.

    Args:
        device_type, dtype: of q, k and v.
        window, documents: whether the masks will have them.
        rectangular: whether causal masks will have an offset, or other keys than queries (context parallelism).
        deterministic: whether the backward must give the same bits every time.

    Returns:
        The kernel and one line for the log: which, why, and why not each faster one for this device.

    Raises:
        KernelUnavailable: a named kernel cannot run here or does not take what is asked; says which can.
    """
    if backend not in BACKENDS:
        raise KernelUnavailable(f"attention backend {backend!r} is none of {', '.join(BACKENDS)}")

    def obstacle(kernel: AttentionKernel) -> str | None:
        # Availability imports packages and asks the driver, so it comes second.
        refusal = kernel.capabilities.refusal(
            device_type=device_type,
            dtype=dtype,
            head_dim=head_dim,
            window=window,
            documents=documents,
            rectangular=rectangular,
            deterministic=deterministic,
        )
        return refusal or kernel.availability()

    if backend != "auto":
        chosen = KERNELS[backend]
        why_not = obstacle(chosen)
        if why_not is None:
            return chosen, f"attention kernel {chosen.name}: as configured"
        able = [name for name, kernel in KERNELS.items() if obstacle(kernel) is None]
        raise KernelUnavailable(
            f"attention backend {backend} cannot run: it {why_not}. Possible here: {', '.join(['auto', *able])}"
        )

    passed_over: list[str] = []
    for kernel in _FASTEST_FIRST:
        if device_type not in kernel.capabilities.device_types:
            continue
        why_not = obstacle(kernel)
        if why_not is None:
            return kernel, _announcement(kernel, device_type, passed_over)
        passed_over.append(f"{kernel.name} {why_not}")
    raise KernelUnavailable(
        f"no attention kernel takes {str(dtype).removeprefix('torch.')} on {device_type} "
        f"(head_dim {head_dim}, window {window}, documents {documents}): "
        f"{'; '.join(passed_over) or f'none runs on {device_type} tensors'}"
    )


def _announcement(kernel: AttentionKernel, device_type: str, passed_over: list[str]) -> str:
    line = f"attention kernel {kernel.name}: the fastest for {device_type} that can run"
    if passed_over:
        line += f" ({'; '.join(passed_over)})"
    if kernel.name == "math" and device_type != "cpu":
        line = f"WARNING: SLOW ATTENTION, memory grows with the square of the sequence length. {line}"
    return line
