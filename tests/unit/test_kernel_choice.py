"""Which kernel a job gets, and what is said of those that it does not get."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import pytest
import torch

from model.config import Backend
from model.kernels import BACKENDS, KERNELS, AttentionKernel, KernelUnavailable, select_kernel
from model.kernels.cuda import import_or_reason


def choose(backend: str, device_type: str, dtype: torch.dtype, head_dim: int = 64) -> tuple[AttentionKernel, str]:
    return select_kernel(backend, device_type=device_type, dtype=dtype, head_dim=head_dim, window=True, documents=True)


def test_auto_on_a_cpu() -> None:
    kernel, why = choose("auto", "cpu", torch.float32)
    assert kernel.name == "cpu" and why == "attention kernel cpu: the fastest for cpu that can run"


def test_auto_passes_over_what_is_missing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_4", "flash_attn_3"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: "needs a better GPU")
    for name in ("cudnn", "flash_attn_2"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: None)
    kernel, why = choose("auto", "cuda", torch.bfloat16)
    assert kernel.name == "flash_attn_2"
    assert "flash_attn_4 needs a better GPU" in why and "torch_flash" not in why
    assert "cudnn has no sliding window" in why
    kernel, why = choose("auto", "cuda", torch.float32)
    assert kernel.name == "math" and why.startswith("WARNING: SLOW ATTENTION")
    assert "flash_attn_2 takes bfloat16, float16, not float32" in why
    kernel, why = choose("auto", "cuda", torch.bfloat16, head_dim=20)
    assert kernel.name == "math" and "in multiples of 8, not 20" in why


def test_auto_takes_cudnn_only_where_it_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_4", "flash_attn_3"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: "needs a better GPU")
    for name in ("cudnn", "flash_attn_2"):
        monkeypatch.setattr(type(KERNELS[name]), "availability", lambda self: None)

    def choice(window: bool = False, documents: bool = False, **needs: bool) -> tuple[str, str]:
        kernel, why = select_kernel(
            "auto",
            device_type="cuda",
            dtype=torch.bfloat16,
            head_dim=128,
            window=window,
            documents=documents,
            **needs,
        )
        return kernel.name, why

    assert choice()[0] == "cudnn"
    for needs, words in (
        ({"window": True}, "has no sliding window"),
        ({"documents": True}, "has no document mask"),
        ({"rectangular": True}, "takes a causal mask only over as many queries as keys"),
        ({"deterministic": True}, "has no deterministic backward"),
    ):
        name, why = choice(**needs)
        assert name == "flash_attn_2" and f"cudnn {words}" in why


@pytest.mark.parametrize(("built", "version", "words"), [(False, None, "built with cuDNN"), (True, 8907, "loads 8907")])
def test_cudnn_that_is_missing_or_old(
    built: bool, version: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.kernels.cudnn.missing_gpu", lambda capabilities: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    why = KERNELS["cudnn"].availability()
    assert why is not None and words in why
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert KERNELS["cudnn"].availability() is None


def test_a_named_backend() -> None:
    kernel, why = choose("math", "cpu", torch.float32)
    assert kernel.name == "math" and why == "attention kernel math: as configured"
    with pytest.raises(
        KernelUnavailable, match=r"flash_attn_2 cannot run: it runs on cuda tensors, not cpu\. Possible"
    ):
        choose("flash_attn_2", "cpu", torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="Possible here: auto, cpu, math"):
        choose("torch_flash", "cpu", torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="'flash' is none of auto, flash_attn_4"):
        choose("flash", "cpu", torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="no attention kernel takes float8_e4m3fn on cpu"):
        choose("auto", "cpu", torch.float8_e4m3fn)
    assert BACKENDS == (
        "auto",
        "flash_attn_4",
        "flash_attn_3",
        "cudnn",
        "flash_attn_2",
        "torch_flash",
        "cpu",
        "math",
    )
    assert get_args(Backend) == BACKENDS


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "torch_flash"])
def test_what_a_machine_lacks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        with pytest.raises(KernelUnavailable, match=f"attention backend {backend} cannot run") as caught:
            select_kernel(backend, device_type="cuda", dtype=torch.bfloat16, head_dim=64, window=False, documents=False)
        return str(caught.value)

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a CUDA build of torch" in refusal()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU, torch sees none" in refusal()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "Tesla T4 has 7.5" in refusal()


def test_an_absent_package_and_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels").mkdir()
    (tmp_path / "broken_kernels" / "__init__.py").write_text("raise ImportError('undefined symbol: _Z3foo')")
    (tmp_path / "needy_kernels.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    package, why = import_or_reason("no_such_kernels.interface", "pip install it")
    assert package is None and why == "needs no_such_kernels.interface, which is not installed; pip install it"
    package, why = import_or_reason("broken_kernels.interface", "reinstall it")
    assert package is None and "undefined symbol: _Z3foo" in why and why.endswith("reinstall it")
    package, why = import_or_reason("needy_kernels", "install it")
    assert package is None and "No module named 'no_such_dependency'" in why
    assert import_or_reason("math", "")[0] is math
