"""Writes the sample at the end of a run, on the layout that the model was trained on.

What could go wrong with it is checked before the first step.
"""

from __future__ import annotations

from launch.config import JobConfig
from launch.data.corpus import Corpus, CorpusError
from launch.data.encoders import encoder_of
from launch.inference.cache_room import check_cache_fits
from launch.inference.generation import generate
from launch.inference.model import attention_on_one_device
from launch.inference.sampling import Sampling
from launch.plurals import counted
from launch.precision import DTYPES
from model.gpt import GPT
from parallel.mesh import ParallelMesh
from parallel.zero import ZeroEngine


def sample_prompt(job: JobConfig, validation: Corpus) -> list[int]:
    """Tokens of the configured prompt, or of the start of the validation text; none where the job
    writes no sample. Raises CorpusError."""
    if job.training.sample_tokens == 0:
        return []
    prompt = encoder_of(job.data.tokenizer).prompt(job.training.sample_prompt) or validation.read(0, 1).tolist()
    if max(prompt) >= job.model.vocab_size:
        raise CorpusError(
            f"training.sample_prompt has token id {max(prompt)} (data.tokenizer: {job.data.tokenizer}), beyond "
            f"model.vocab_size ({job.model.vocab_size}); give the tokenizer of this corpus"
        )
    return prompt


def check_sample_fits(job: JobConfig, prompt: list[int], mesh: ParallelMesh, device_type: str, free: int) -> None:
    """`free`: bytes that there are on a rank. Raises CacheTooLarge."""
    if prompt:
        check_cache_fits(
            job.model,
            [prompt[-job.training.sequence_length :]],
            job.training.sample_tokens,
            asked="training.sample_tokens",
            tensor_parallel_size=mesh.tp_size,
            dtype=DTYPES[job.resolve_precision(device_type)],
            free=free,
        )


def write_sample(job: JobConfig, prompt: list[int], mesh: ParallelMesh, engine: ZeroEngine) -> str:
    """What the trained model writes after the prompt. Collective."""
    tokenizer, length = encoder_of(job.data.tokenizer), job.training.sequence_length
    dtype = DTYPES[job.resolve_precision(engine.device.type)]
    model = engine.model
    assert isinstance(model, GPT)
    engine.eval()
    (written,) = generate(
        engine,
        model,
        attention_on_one_device(job.model, engine.device, dtype),
        [prompt[-length:]],
        job.training.sample_tokens,
        Sampling(seed=job.job.seed),
        device=engine.device,
        window=length,  # no distance that the model was not trained on
        multiple_of=mesh.tp_size if job.sequence_parallel else 1,
    )
    engine.train()
    return f"sample ({counted(len(written), 'token')}):\n{tokenizer.decode(prompt + written)}"
