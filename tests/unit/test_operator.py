"""The attention operator under torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import KERNELS, KernelOperator
from model.kernels.operator import _operators


class Keeping(KernelOperator):
    """Keeps `count` numbers for its backward."""

    def __init__(self, count: int):
        super().__init__(KERNELS["cpu"], scale=0.25)
        self.count = count

    def saved_shapes(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return super().saved_shapes(q, k)[0], (self.count,)

    def forward(self, *inputs: Any, **places: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, _ = super().forward(*inputs, **places)
        return out, lse, out.new_empty(self.count)


def test_a_graph_kept_on_disk_is_not_taken_for_an_operator_that_keeps_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a second run, of another mode or another version, numbers its operators as the first did."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = torch.randn(3, 1, 8, 2, 16)
    results = []
    for count in (7, 9):
        torch._dynamo.reset()
        operator = Keeping(count)
        operator.number = 10**6
        _operators[operator.number] = operator
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)  # no sum of gradients: nothing for a compiler
        out = torch.compile(lambda *tensors, attend=operator: attend(*tensors, None))(q, k, v)
        results.append(torch.autograd.grad(out, q, inputs[0])[0])
    assert torch.equal(*results)
