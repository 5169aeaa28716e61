"""Figures of a step from its trace: a made-up step of round numbers gives them back."""

from __future__ import annotations

from typing import Any

import pytest

from launch.memory.parameters import count_parameters
from step_time import block_parameters, head_flops, product_flops
from trace_figures import figures
from workload import job_of

JOB = job_of(["model.num_hidden_layers=2"])
MICRO_BATCHES = 8


def kernels(name: str, count: int, seconds: float) -> list[dict[str, Any]]:
    return [{"cat": "kernel", "name": name, "dur": 1e6 * seconds}] * count


def trace(forwards: int = 2 * MICRO_BATCHES) -> dict[str, Any]:
    block, whole = block_parameters(JOB.model) / 2, count_parameters(JOB.model) / 2
    operations = MICRO_BATCHES * (2 * 3 * product_flops(JOB.model, 8192) + head_flops(JOB.model, 8192))
    events = [
        *kernels("nvjet_sm90_tst", 10, operations / 6e14 / 10),
        *kernels("kernel_cutlass_FlashAttentionForwardSm90", forwards, 0.001),
        *kernels("kernel_cutlass_FlashAttentionBackwardSm90", forwards, 0.003),
        *kernels("kernel_cutlass_FlashAttentionBackwardPostprocess", forwards, 0.0005),
        *kernels("triton_poi_fused__unsafe_view_mul_silu_4", 16, 8192 * 3 * 14336 * 2 / 4e12),
        *kernels("triton_poi_fused__unsafe_view_mul_silu_silu_backward_view_0", 16, 1.0),
        *kernels("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 4, 28 * whole / 3e12 / 4),
        *kernels("ncclDevKernel_AllGather_RING_LL", 32, 2 * block / 2e11),
        *kernels("ncclDevKernel_AllGather_RING_LL", 40, 5e-6),
        *kernels("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 16, 4 * block / 1e11),
        {"cat": "cpu_op", "name": "nvjet", "dur": 1e12},
    ]
    return {
        "traceEvents": events,
        "distributedInfo": {"world_size": 2},
        "deviceProperties": [{"name": "NVIDIA H200"}],
    }


def test_figures_of_a_step() -> None:
    found = figures(trace(), JOB)
    assert found["products_forward"] == pytest.approx(product_flops(JOB.model, 8192) / 6e14)
    assert found["products_backward"] == 2 * found["products_forward"]
    assert found["head"] == pytest.approx(head_flops(JOB.model, 8192) / 6e14)
    assert (found["attention_forward"], found["attention_backward"]) == pytest.approx((0.001, 0.0035))
    assert found["elementwise_bytes_per_second"] == pytest.approx(4e12)
    assert found["adamw_bytes_per_second"] == pytest.approx(3e12)
    assert found["gather_bytes_per_second"] == pytest.approx(2e11)
    assert found["reduce_bytes_per_second"] == pytest.approx(1e11)


def test_another_step_than_the_job_is_refused() -> None:
    with pytest.raises(ValueError, match="32 attention kernels, where the job's step has 16"):
        figures(trace(forwards=32), JOB)
    with pytest.raises(ValueError, match="no kernel of products"):
        figures(trace() | {"traceEvents": []}, JOB)
