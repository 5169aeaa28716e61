"""The layout report of `--check`, and the jobs that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.check import layout_report
from launch.config import load_job
from tests.unit.job_files import weights_for

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORLD_SIZES = {
    "quickstart": 4,
    "llama3-8b-8k": 8,
    "llama3-8b-8k-tp2": 16,
    "llama3-8b-64k": 8,
    "llama3-8b-128k": 32,
    "llama3-8b-512k": 2,
    "llama3-8b-finetune": 8,
    "llama3-70b-8k": 64,
}
PUBLISHED = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}
"""Parameters."""


def test_every_configuration_is_listed() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(WORLD_SIZES)


@pytest.mark.parametrize(("name", "world_size"), WORLD_SIZES.items())
def test_shipped_jobs_are_valid(name: str, world_size: int, tmp_path: Path) -> None:
    job = load_job(CONFIGS / f"{name}.yaml", weights_for(CONFIGS / f"{name}.yaml", tmp_path), world_size)
    assert job.job.name == name
    text = layout_report(job, world_size)
    assert text.startswith(f"job {name}: valid on {world_size} processes\n")
    if name != "quickstart":
        assert job.num_parameters == PUBLISHED["-".join(name.split("-")[:2])]
        assert job.slurm.nodes * job.slurm.gpus_per_node == world_size
        assert "GiB" in text


def test_jobs_that_share_a_shape_differ_where_they_say() -> None:
    plain, split = (load_job(CONFIGS / f"{name}.yaml", [], None) for name in ("llama3-8b-8k", "llama3-8b-8k-tp2"))
    for section in ("model", "data", "optimizer", "checkpoint", "monitor"):
        assert getattr(plain, section) == getattr(split, section)
    assert plain.tokens_per_step == split.tokens_per_step


def test_report_of_a_long_context_job() -> None:
    overrides = ["model.vocab_size=128257", "parallel.tensor_parallel_size=2"]
    job = load_job(CONFIGS / "llama3-8b-128k.yaml", overrides, 32)
    text = layout_report(job, 32)
    lines = text.splitlines()
    assert "mesh: tp 2 x cp 8 x dp 2; rank = (dp * 8 + cp) * 2 + tp" in lines
    assert "     1    3   22 23" in lines
    assert "heads per rank   16 query, 4 key/value (of 32 and 8), head_dim 128" in lines
    assert ("tokens per rank  16,384 in a micro-batch: 1 sequence x 16,384 of 131,072 tokens") in lines
    assert "accumulation     16 micro-batches x 1 sequence x dp 2 = 32 sequences, 4,194,304 tokens a step" in lines
    assert "vocabulary       128,257, padded to 128,258 for tp 2" in lines
    assert "heads over 4 around exchange of keys over 2 ranks" in text


def test_many_ranks_are_shown_by_rule() -> None:
    job = load_job(CONFIGS / "llama3-8b-128k.yaml", [], 256)
    lines = layout_report(job, 256).splitlines()
    assert lines[lines.index("  ... and so on to rank 255") - 1] == "     1    7   15"
    assert len(lines) < 50
    lines = layout_report(load_job(CONFIGS / "llama3-70b-8k.yaml", [], 64), 64).splitlines()
    assert "    15    0   60 61 62 63" in lines and not any("and so on" in line for line in lines)
    lines = layout_report(load_job(CONFIGS / "llama3-70b-8k.yaml", ["parallel.tensor_parallel_size=8"], 128), 128)
    assert "     7    0   56 57 58 59 60 61 62 63\n  ... and so on to rank 127" in lines


def test_a_second_copy_of_the_parameters_is_named() -> None:
    """8.03 billion parameters of 2 bytes: a sixteenth, and an eighth."""
    job = load_job(CONFIGS / "llama3-8b-8k.yaml", ["parallel.secondary_partition_size=8"], 16)
    row = "  parameters           2.80   1/16 of the tensor-parallel rank's, and 1/8 again (secondary_partition_size)"
    assert row in layout_report(job, 16).splitlines()


def test_what_is_offloaded_is_said_row_by_row() -> None:
    """Gradients (8 bytes a parameter), masters (4), moments (8) and parameters (2) of an eighth of 8.03 billion."""
    offload = ["parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu"]
    text = layout_report(load_job(CONFIGS / "llama3-8b-8k.yaml", offload, 8), 8)
    for name, size in (("parameters", 1.87), ("gradients", 7.48), ("master weights", 3.74), ("Adam moments", 7.48)):
        assert f"  {name:<16} {size:8.2f}   1/8 of the tensor-parallel rank's, in host memory\n" in text
    assert "  offloaded           20.57   what of these is in host memory, not part of the peak\n" in text
    whole = layout_report(load_job(CONFIGS / "llama3-8b-8k.yaml", ["parallel.zero_stage=0"], 8), 8)
    assert "  master weights       0.00   none: the parameters are fp32\n" in whole


def test_precision_follows_the_device() -> None:
    job = load_job(CONFIGS / "quickstart.yaml", [], 4)
    assert "memory of one rank, bf16, ZeRO-3" in layout_report(job, 4)
    assert "memory of one rank, fp32, ZeRO-3" in layout_report(job, 4, "cpu")


@pytest.mark.parametrize(("device", "beside"), [("cpu", ""), ("cuda", "; not on the GPU")])
def test_asynchronous_saves_take_host_memory(device: str, beside: str) -> None:
    """On CPUs that is the memory that the peak counts; on GPUs it is another. 8,030,261,248 x 12 bytes over 8 ranks."""
    peaks = []
    for asynchronous in ("true", "false"):
        job = load_job(CONFIGS / "llama3-8b-8k.yaml", [f"checkpoint.asynchronous={asynchronous}"], 8)
        rows = {line[2:18].strip(): line[18:].strip() for line in layout_report(job, 8, device).splitlines()}
        copies = f"11.22   host memory of asynchronous saves: fp32 weights and moments{beside}"
        assert rows.get("host copies") == (copies if asynchronous == "true" else None)
        peaks.append(float(rows["peak"].split()[0]))
    assert peaks[0] - peaks[1] == pytest.approx(11.22 if device == "cpu" else 0, abs=0.02)


def test_a_world_that_does_not_fit_is_refused() -> None:
    job = load_job(CONFIGS / "quickstart.yaml", [], None)
    with pytest.raises(ValueError, match=r"world size \(6\)"):
        layout_report(job, 6)
