"""Rules about section `model`, whose keys are in `model.config`."""

from __future__ import annotations

from launch.data.encoders import BYTES
from launch.precision import DTYPES, resolve_precision
from launch.settings.rules import Job, idle, rule
from model.kernels import KERNELS


@rule("model.vocab_size", "data.tokenizer", "data.source")
def _bytes_fit_the_vocabulary(job: Job) -> None:
    if job.data.source != "indexed" and job.data.tokenizer == BYTES and job.model.vocab_size < 256:
        raise ValueError(
            f"vocab_size ({job.model.vocab_size}) must be at least 256 for tokenizer bytes, "
            "which has 256 tokens; raise it or give a tokenizer.json"
        )


@rule(
    "model.attention_backend",
    "model.head_dim",
    "model.sliding_window",
    "data.document_mask",
    "parallel.context_parallel_size",
    "job.device",
    "training.precision",
    "training.deterministic",
)
def _named_kernel_takes_the_job(job: Job) -> None:
    """What a kernel declares, not whether this machine has it: the login node need not."""
    backend = job.model.attention_backend
    if backend == "auto":
        return

    def refusal(name: str) -> str | None:
        capabilities = KERNELS[name].capabilities
        device = capabilities.device_types[0] if job.job.device == "auto" else job.job.device
        return capabilities.refusal(
            device_type=device,
            dtype=DTYPES[resolve_precision(job.training.precision, device)],
            head_dim=job.model.head_dim,
            window=job.model.sliding_window is not None,
            documents=job.data.document_mask,
            rectangular=job.parallel.context_parallel_size > 1,
            deterministic=job.training.deterministic,
        )

    why_not = refusal(backend)
    if why_not is not None:
        able = [name for name in KERNELS if refusal(name) is None]
        raise ValueError(
            f"attention_backend {backend} cannot run this job: it {why_not}; choose {' or '.join(['auto', *able])}"
        )


@idle("model.sliding_window")
def _the_window_holds_all(job: Job) -> str | None:
    window, length = job.model.sliding_window, job.training.sequence_length
    if window is not None and window >= length:
        return f"sequence_length ({length}) is no longer; lower it, or keep it for longer sequences"
    if window is not None and set(job.model.windows) == {None}:
        return f"full_attention_layers names all {job.model.num_hidden_layers} blocks; leave some out, or both keys"
    return None


@idle("model.full_attention_layers")
def _no_block_has_a_window(job: Job) -> str | None:
    if job.model.sliding_window is None:
        return "sliding_window is null, so every block sees all tokens before it; set it, or leave both out"
    return None
