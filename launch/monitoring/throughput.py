"""From a step's duration to tokens per second, floating-point operations per token, and model FLOP/s utilisation.

Legend: S sequence length, H query heads, D head_dim.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from launch.config import JobConfig
from model.config import ModelConfig
from parallel.sequence import causal_pairs

# Dense (no sparsity) bf16 and fp16 FLOP/s of one device, from the makers' data sheets, by a pattern of its
# name. The first match counts, so variants stand before the name that they contain.
PEAK_FLOPS = {
    r"\bGB200\b": 2500e12,
    r"\bB200\b": 2250e12,
    r"\bGH200\b": 989e12,
    r"\bH200 NVL\b": 835e12,
    r"\bH200\b": 989e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100\b": 989e12,
    r"\bA100\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bL4\b": 121e12,
    r"\bA10\b": 125e12,
    r"\bMI300X\b": 1307e12,
}


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Peak of one device as torch names it; None for an unknown one, and for fp32, which has another peak."""
    if precision not in ("bf16", "fp16"):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(name, device_name)), None)


def flops_per_token(config: ModelConfig, sequence_length: int, *, causal: bool) -> float:
    """Floating-point operations of training on one token: forward, and twice that backward.

    6 * M + 12 * H * D * V (PaLM, appendix B): M counts the elements of the matrices that a token is multiplied with,
    head included (tied or not), embedding lookup and norms excluded; recomputation in the backward pass is not counted
    either. V is the number of keys that a query is held to see, summed over the blocks: S each (full), or those that
    the causal mask shows on average, (S + 1) / 2. A sliding window of w shows at most w: min(S, w) (full), the mean of
    min(i, w) over i = 1..S (causal).
    """
    heads = config.num_attention_heads * config.head_dim
    key_value_heads = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * key_value_heads + 3 * config.intermediate_size)
    matrices = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    if causal:
        visible = sum(causal_pairs(sequence_length, window) / sequence_length for window in config.windows)
    else:
        visible = sum(min(sequence_length, window or sequence_length) for window in config.windows)
    return 6.0 * matrices + 12.0 * heads * visible


@dataclass(frozen=True)
class Throughput:
    """The constants that turn seconds per step into rates."""

    tokens_per_step: int
    """Tokens of the whole job: global_batch_size * sequence_length."""
    devices: int
    """Processes of the job, one device each."""
    flops_causal: float
    """Per token, counting what the causal mask shows."""
    flops_full: float
    """Per token, counting the full square."""
    peak_flops: float | None
    """Peak FLOP/s of one device; None leaves the utilisation out."""

    @classmethod
    def of_job(cls, job: JobConfig, devices: int, device: torch.device) -> Throughput:
        """The constants of `job` on this many devices, all of them like `device`."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        known, given = peak_flops_per_second(name, job.resolve_precision(device.type)), job.monitor.peak_tflops
        return cls(
            tokens_per_step=job.tokens_per_step,
            devices=devices,
            flops_causal=flops_per_token(job.model, job.training.sequence_length, causal=True),
            flops_full=flops_per_token(job.model, job.training.sequence_length, causal=False),
            peak_flops=known if given is None else given * 1e12,
        )

    def rates(self, seconds: float) -> dict[str, float]:
        """Rates of a step that took `seconds`. MFU = FLOP per token * tokens per second and device / peak
        FLOP/s."""
        total = self.tokens_per_step / seconds
        each = total / self.devices
        rates = {"tokens_per_second": total, "tokens_per_second_per_device": each}
        if self.peak_flops is not None:
            rates["mfu_causal"] = each * self.flops_causal / self.peak_flops
            rates["mfu_full"] = each * self.flops_full / self.peak_flops
        return rates
