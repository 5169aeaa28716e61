"""Something to evaluate, and what the plain model says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from launch.config import JobConfig, load_job
from launch.data.corpora import load_corpora, validation_batches
from launch.weights.reader import Part, open_weights
from launch.weights.safetensors_folder import ShardWriter
from launch.weights.stored_model import parameter_shapes, write_model
from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS, Documents

LENGTH = 32
MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
JOB = f"""
job: {{device: cpu}}
model: {{attention_backend: math}}
data: {{source: files, files: [FOLDER/*.txt], validation_fraction: 0.4}}
optimizer: {{learning_rate: 0.01}}
training: {{sequence_length: {LENGTH}, global_batch_size: 4, max_steps: 1, evaluation_batches: 2}}
"""


def to_evaluate(folder: Path) -> Path:
    """The folder, with a converted model of random weights, a corpus of many short documents, and a job."""
    generator = torch.Generator().manual_seed(4)
    writer = ShardWriter(folder)
    for name, shape in parameter_shapes(MODEL).items():
        writer.add(name, 0.4 * torch.randn(shape, generator=generator))
    writer.finish()
    write_model(folder, MODEL)
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(chr(97 + (number * i * i) % 26) for i in range(20 + number)))
    (folder / "job.yaml").write_text(JOB.replace("FOLDER", str(folder)))
    return folder


def job_of(folder: Path, tp: int, cp: int, stage: int, document_mask: bool) -> JobConfig:
    overrides = [f"model.init_from={folder}", f"data.document_mask={str(document_mask).lower()}"]
    overrides += [f"parallel.tensor_parallel_size={tp}", f"parallel.context_parallel_size={cp}"]
    return load_job(folder / "job.yaml", [*overrides, f"parallel.zero_stage={stage}"])


@torch.no_grad()
def expected(folder: Path, document_mask: bool) -> list[tuple[int, float]]:
    """(position, loss) of every token of the validation batches."""
    job = job_of(folder, 1, 1, 0, document_mask)
    model = GPT(MODEL, kernel_attention(KERNELS["math"], MODEL))
    open_weights(folder).read([Part(name, (0,) * p.dim(), p.data) for name, p in model.named_parameters()])
    found = []
    batches = validation_batches(load_corpora(job), job, dp_size=1, dp_rank=0)
    for batch in (batch for micro_batches in batches.once(2) for batch in micro_batches):
        documents = Documents.from_boundaries(batch.boundaries, "cpu") if batch.boundaries else None
        logits = model(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids), None, documents)
        losses = -logits.double().log_softmax(dim=-1).numpy()
        for row, column in np.argwhere(batch.labels >= 0):
            found.append((int(batch.position_ids[row, column]), losses[row, column, batch.labels[row, column]]))
    return found
