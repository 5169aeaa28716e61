"""A run that starts from converted weights has just those, on every layout, and gives them back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from launch.build import build_engine
from launch.config import JobConfig, load_job
from launch.convert import to_hf
from launch.data.batches import Batches, SequenceSampler
from launch.data.corpus import Corpus
from launch.run_lock import RunDirectoryError
from launch.saving.checkpoint import Checkpoints
from launch.saving.checkpoint_records import Progress
from launch.saving.resume_checks import settings
from launch.saving.storage import storage_at
from launch.weights.initial_weights import _parts, load_initial_weights
from launch.weights.reader import Part, open_weights
from launch.weights.safetensors_folder import SINGLE, ShardWriter
from launch.weights.stored_model import WeightsError, parameter_shapes, write_model
from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS
from parallel.mesh import ParallelMesh
from parallel.sequence import shard_sequence
from tests.distributed.harness import run_distributed

B, S, V = 4, 16, 61
MODEL = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias="qkv",
    tie_word_embeddings=True,
    attention_backend="math",
)
JOB = """
model: {init_from: FOLDER, attention_backend: math}
data: {source: files, files: [unused]}
optimizer: {learning_rate: 0.01}
training: {sequence_length: 16, global_batch_size: 4, max_steps: 2}
"""
LAYOUTS = [(1, 1, 0, "fp32"), (1, 1, 2, "bf16"), (2, 1, 3, "fp32"), (2, 2, 1, "fp32"), (1, 2, 3, "bf16")]
"""tp, cp, stage, precision; dp is what remains of four."""


def write_weights(folder: Path) -> dict[str, Tensor]:
    """A converted model of random bf16 weights: fp32 and bf16 runs start from the same numbers."""
    generator = torch.Generator().manual_seed(11)
    weights = {
        name: (0.3 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in parameter_shapes(MODEL).items()
    }
    folder.mkdir()
    writer = ShardWriter(folder, shard_bytes=5_000)
    for name, tensor in weights.items():
        writer.add(name, tensor)
    writer.finish()
    write_model(folder, MODEL)
    return weights


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, position_ids, labels, all [B, S]."""
    tokens = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], torch.arange(S).expand(B, S), tokens[:, 1:]


@torch.no_grad()
def expected_loss(weights: dict[str, Tensor]) -> float:
    model = GPT(MODEL, kernel_attention(KERNELS["math"], MODEL))
    missing = model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    loss, _ = model(*batch())
    return loss.item()


def job_for(root: Path, tp: int, cp: int, stage: int, precision: str) -> JobConfig:
    path = root / f"job-{dist.get_rank()}.yaml"
    path.write_text(JOB.replace("FOLDER", str(root / "weights")))
    overrides = {
        "job.run_directory": f"{root}/{tp}-{cp}-{stage}-{precision}",
        "parallel.tensor_parallel_size": tp,
        "parallel.context_parallel_size": cp,
        "parallel.zero_stage": stage,
        "training.precision": precision,
        # Of the first run they lie where its configuration says, of the others in the run's own folder.
        "checkpoint.directory": f"{root}/elsewhere/{{name}}" if (tp, cp, stage, precision) == LAYOUTS[0] else "null",
        "data.tokenizer": root / "tokenizer.json",
    }
    return load_job(path, [f"{key}={value}" for key, value in overrides.items()], 4)


def start(root: Path) -> list[tuple[float, int]]:
    """The loss of each layout's model on the whole batch, and the elements read for it; a checkpoint of each."""
    found = []
    for layout in LAYOUTS:
        job = job_for(root, *layout)
        mesh = ParallelMesh.create(job.mesh_shape(4))
        engine, _ = build_engine(job, mesh, torch.device("cpu"))
        load_initial_weights(job, engine)
        elements = sum(
            part.tensor.numel() for one in engine.fragments() for part in _parts(one, engine.shards[one.name])
        )
        engine.eval()
        rows = slice(mesh.dp_rank * B // mesh.dp_size, (mesh.dp_rank + 1) * B // mesh.dp_size)
        local = (
            torch.from_numpy(shard_sequence(tensor[rows].numpy(), mesh.cp_size, mesh.cp_rank).copy())
            for tensor in batch()
        )
        with torch.no_grad():
            loss = engine(*local)[0].float()
        dist.all_reduce(loss, group=mesh.zero_group)
        found.append((loss.item(), elements))
        if dist.get_rank() == 0:
            job.run_path.mkdir()
            (job.run_path / "config.yaml").write_text(job.to_yaml())
        dist.barrier()
        checkpoints = Checkpoints(storage_at(job.checkpoint_location), keep_last=1, settings=settings(job))
        corpus = Corpus.from_documents("training", np.zeros(100, np.uint8), [100], "")
        checkpoints.save(engine, Progress(), Batches(SequenceSampler(corpus, 8, 0), 1, 1, 1, 0))
        saved = checkpoints.outcome(wait=True)
        assert saved is not None and saved.error is None
    return found


def test_every_layout_starts_from_the_weights(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    expected = expected_loss(weights)
    size = sum(tensor.numel() for tensor in weights.values())
    for found in run_distributed(start, 4, tmp_path):
        for layout, (loss, elements) in zip(LAYOUTS, found, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5 if layout[3] == "fp32" else 1e-2), layout
            if layout[2]:  # stage 0 keeps the whole model on one rank of dp x cp
                assert elements < 0.3 * size, "a rank reads its quarter, and what all keep"
    for layout in LAYOUTS:
        run = tmp_path / "-".join(map(str, layout))
        assert (run / "checkpoints").exists() == (layout != LAYOUTS[0])
        stored = open_weights(run)
        for name, tensor in weights.items():
            found = torch.empty(tensor.shape)
            stored.read([Part(name, (0,) * tensor.dim(), found)])
            assert torch.equal(found, tensor.float()), f"{name} of {layout}"
    check_slices(run, weights)
    said = to_hf(run, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / SINGLE)
    assert "Qwen2ForCausalLM" in said and said.endswith("tokenizer copied")
    assert torch.equal(exported["model.layers.1.self_attn.k_proj.bias"], weights["layers.1.attention.k_proj.bias"])
    assert len(exported) == len(weights)
    check_refusals(run, tmp_path / "not written")


def check_refusals(run: Path, out: Path) -> None:
    """Before anything is exported, a checkpoint is compared with its checksums."""
    with pytest.raises(WeightsError, match="holds no checkpoint of step 7; there are those of 0"):
        to_hf(run, out, step=7)
    file = max((run / "checkpoints" / "step-00000000").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=f"is damaged: {file.name} does not match its CRC-32; give --step"):
        to_hf(run, out)
    file.write_bytes(content[: len(content) // 3])
    with pytest.raises(WeightsError, match="is damaged: .* bytes instead of"):
        to_hf(run, out)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(WeightsError, match="holds no complete checkpoint; train the run until it saves one"):
        to_hf(run, out)
    assert not out.exists()


def check_slices(run: Path, weights: dict[str, Tensor]) -> None:
    """Any rectangle can be read, into any type."""
    name = "layers.0.attention.q_proj.weight"
    for folder in (run, run.parent / "weights"):
        found = torch.empty(5, 7, dtype=torch.float64)
        open_weights(folder).read([Part(name, (20, 11), found)])
        assert torch.equal(found, weights[name][20:25, 11:18].double())


def refuse(root: Path) -> str:
    """What every rank says where one rank cannot write, then where one cannot read."""
    job = job_for(root, 2, 1, 1, "fp32")
    mesh = ParallelMesh.create(job.mesh_shape(4))
    engine, _ = build_engine(job, mesh, torch.device("cpu"))
    kept = job.run_path / "hugging_face" / "tokenizer.json"
    kept.mkdir(parents=True, exist_ok=True)
    with pytest.raises(RunDirectoryError, match=f"{job.run_path} cannot be written .*Is a directory.* mend that"):
        load_initial_weights(job, engine)
    dist.barrier()
    if dist.get_rank() == 0:
        kept.rmdir()
    dist.barrier()
    load_initial_weights(job, engine)
    assert kept.read_text() == "{}" and kept.stat().st_mode & 0o200, "a second start can replace it"
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.move(root / "weights" / "model.yaml", root / "elsewhere")
    dist.barrier()
    with pytest.raises(WeightsError) as caught:
        load_initial_weights(job, engine)
    return str(caught.value)


def test_all_ranks_stop_together(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights")
    tokenizer = tmp_path / "weights" / "hugging_face" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    tokenizer.chmod(0o444)
    said: list[Any] = run_distributed(refuse, 4, tmp_path)
    assert len(set(said)) == 1 and said[0].startswith("rank 0: "), said
    assert "is neither a run" in said[0]
