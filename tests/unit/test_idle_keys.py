"""Keys that were set and do nothing: each is told, alone, until what makes it idle is changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.check import layout_report
from launch.config import SECTIONS, load_job
from launch.settings.rules import IDLE
from tests.unit.job_files import load, weights_for

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BLEND = ["data.source=indexed", "data.blend=[{path: web}]"]

IDLE_JOBS: list[tuple[list[str], str, str, list[str]]] = [
    (
        ["model.sliding_window=64"],
        "model.sliding_window = 64",
        "sequence_length (64) is no longer",
        ["model.sliding_window=63"],
    ),
    (
        ["model.sliding_window=20", "model.full_attention_layers=[0, 1]", "model.num_hidden_layers=2"],
        "model.sliding_window = 20",
        "full_attention_layers names all 2 blocks",
        ["model.full_attention_layers=[1]"],
    ),
    (
        ["model.full_attention_layers=[0]"],
        "model.full_attention_layers = [0]",
        "sliding_window is null",
        ["model.sliding_window=20"],
    ),
    (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel = true",
        "tensor_parallel_size (1) splits no layer",
        ["parallel.tensor_parallel_size=2"],
    ),
    (
        ["parallel.context_parallel_mode=ring"],
        "parallel.context_parallel_mode = ring",
        "context_parallel_size (1) splits no sequence",
        ["parallel.context_parallel_size=2"],
    ),
    (
        [
            "parallel.context_parallel_mode=heads",
            "parallel.context_parallel_size=2",
            "parallel.tensor_parallel_size=4",
        ],
        "parallel.context_parallel_mode = heads",
        "a rank's num_key_value_heads (1) and context_parallel_size (2) have no divisor in common",
        ["parallel.tensor_parallel_size=2"],
    ),
    (
        ["parallel.context_parallel_graphs=true"],
        "parallel.context_parallel_graphs = true",
        "context_parallel_size (1) splits no sequence",
        ["parallel.context_parallel_size=2"],
    ),
    (
        ["parallel.context_parallel_graphs=true", "parallel.context_parallel_size=2", "data.document_mask=true"],
        "parallel.context_parallel_graphs = true",
        "data.document_mask is true",
        ["data.document_mask=false"],
    ),
    (
        ["parallel.overlap_communication=false", "parallel.zero_stage=0"],
        "parallel.overlap_communication = false",
        "zero_stage (0) reduces gradients after computing",
        ["parallel.zero_stage=1"],
    ),
    (
        ["parallel.secondary_partition_size=8"],
        "parallel.secondary_partition_size = 8",
        "dp x cp has no more ranks (8 here)",
        ["parallel.secondary_partition_size=4"],
    ),
    (
        [*BLEND, "data.validation_paths=[held]", "data.validation_fraction=0.2"],
        "data.validation_fraction = 0.2",
        "validation_paths (held) are read instead",
        ["data.validation_paths=[]"],
    ),
    (
        [*BLEND, "data.cache_directory=cache"],
        "data.cache_directory = cache",
        "source (indexed) reads tokens where they lie",
        ["data.blend=[]", "data.source=python_stdlib"],
    ),
    (
        ["optimizer.min_learning_rate_ratio=0.2", "optimizer.schedule=constant"],
        "optimizer.min_learning_rate_ratio = 0.2",
        "schedule (constant) stays at the peak",
        ["optimizer.schedule=wsd"],
    ),
    (
        ["optimizer.decay_fraction=0.2"],
        "optimizer.decay_fraction = 0.2",
        "schedule (cosine) has no decay of a given length",
        ["optimizer.schedule=wsd"],
    ),
    (
        ["training.mlp_tile_tokens=64"],
        "training.mlp_tile_tokens = 64",
        "a rank's micro-batch has 64 tokens, which layers compute at once, and keeps compile auto from compiling them",
        ["training.micro_batch_size=2", "training.global_batch_size=16"],
    ),
    (
        ["training.mlp_tile_tokens=32", "parallel.context_parallel_size=2", "training.compile=true"],
        "training.mlp_tile_tokens = 32",
        "a rank's micro-batch has 32 tokens, which layers compute at once; lower it",
        ["training.mlp_tile_tokens=16"],
    ),
    (
        ["training.sample_prompt=Once"],
        "training.sample_prompt = Once",
        "sample_tokens (0) writes no sample",
        ["training.sample_tokens=5"],
    ),
    (
        ["checkpoint.on_save_error=stop"],
        "checkpoint.on_save_error = stop",
        "save_interval (0) saves only at the end",
        ["checkpoint.save_interval=5"],
    ),
    (
        ["checkpoint.accept_changes=[data]", "checkpoint.resume=never"],
        "checkpoint.accept_changes = [data]",
        "resume (never) reads no checkpoint",
        ["checkpoint.resume=required"],
    ),
    (
        ["monitor.histograms=true", "monitor.tensorboard=false"],
        "monitor.histograms = true",
        "tensorboard is false",
        ["monitor.tensorboard=true"],
    ),
    (
        ["health.outlier=0.5", "health.probe=false"],
        "health.outlier = 0.5",
        "probe is false",
        ["health.probe=true"],
    ),
    (
        ["health.hang_grace_seconds=5", "health.on_hang=report"],
        "health.hang_grace_seconds = 5.0",
        "on_hang is report",
        ["health.on_hang=stop"],
    ),
    (
        ["slurm.gres=gpu:h100", "job.device=cpu"],
        "slurm.gres = gpu:h100",
        "job.device (cpu) asks for no GPU",
        ["job.device=auto"],
    ),
    (
        ["slurm.max_idle_slices=5", "slurm.max_restarts=0"],
        "slurm.max_idle_slices = 5",
        "max_restarts (0) queues no job again",
        ["slurm.max_restarts=1"],
    ),
]


@pytest.mark.parametrize(("overrides", "key", "why", "remedy"), IDLE_JOBS)
def test_idle_keys_are_told(tmp_path: Path, overrides: list[str], key: str, why: str, remedy: list[str]) -> None:
    world = 8
    (told,) = load(tmp_path, *overrides).idle_keys(world)
    assert told.startswith(f"{key} does nothing: ") and why in told
    assert load(tmp_path, *overrides, *remedy).idle_keys(world) == []


def test_each_has_its_job() -> None:
    keys = {re.split(" = ", key)[0] for _, key, _, _ in IDLE_JOBS}
    assert keys == {".".join(map(str, path)) for path, _ in IDLE}
    assert all(key in SECTIONS[str(section)].model_fields for (section, key), _ in IDLE)


def test_a_world_that_is_not_known_makes_no_key_idle(tmp_path: Path) -> None:
    assert load(tmp_path, "parallel.secondary_partition_size=8").idle_keys() == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_shipped_job_does_something(path: Path, tmp_path: Path) -> None:
    assert load_job(path, weights_for(path, tmp_path)).idle_keys() == []


def test_the_check_tells_them(tmp_path: Path) -> None:
    job = load(tmp_path, "parallel.context_parallel_graphs=true")
    assert layout_report(job, 1).endswith("\n\nwithout effect\n  " + job.idle_keys(1)[0])
    assert "without effect" not in layout_report(load(tmp_path), 1)
