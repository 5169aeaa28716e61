"""What the parts of a training step cost on this machine by themselves: the inputs of `scaling_model.py`.

    torchrun --nproc-per-node 2 benchmarks/machine_figures.py --output docs/machine.json

All at the Llama-3-8B shape in bf16, 8,192 tokens, on every GPU at once, the slower one's median over at least a second
each, so that clocks have settled:

- the matrix products of one block, forward and backward;
- attention, forward and backward, at 8,192 and at 65,536 tokens; the head with its loss;
- bytes per second of elementwise work on tensors far larger than the cache, and of torch's fused AdamW;
- gathering a block's parameters and reducing its gradients (fp32) over all GPUs, as bytes received per second, and what
  share of their speed the products keep while that goes on beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import load_job
from launch.memory.parameters import count_parameters
from model.attention import KernelAttention
from model.config import ModelConfig
from model.kernels import select_kernel
from model.kernels.linear_cross_entropy import linear_cross_entropy
from parallel.zero import initialize_distributed
from workload import CONFIG, device_of

Work = Callable[[], object]


class Stopwatch:
    """Medians of repeated work on every rank at once."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds

    def __call__(self, work: Work) -> float:
        """Seconds of one call, the slowest rank's."""
        for _ in range(2):
            work()
        once = self._batch(work, 1)
        calls = max(1, round(0.05 / once))
        batches = max(3, round(self.seconds / (once * calls)))
        mine = statistics.median(self._batch(work, calls) for _ in range(batches))
        slowest = torch.tensor([mine], device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    def _batch(self, work: Work, calls: int) -> float:
        # Every rank takes the number of calls of rank 0's clock: collectives must match.
        self._wait()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        self._wait()
        elapsed = torch.tensor([(time.perf_counter() - started) / calls], device=self.device)
        dist.broadcast(elapsed, 0)
        return elapsed.item()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def figures(model: ModelConfig, tokens: int, long_tokens: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """All figures, by name; seconds, bytes per second or shares."""
    measure, block = Stopwatch(device, seconds), block_elements(model)
    elements = 16 * block
    found: dict[str, Any] = {"tokens": tokens, "long_tokens": long_tokens}
    forward, backward = products(model, tokens, device)
    found["products_forward"], found["products_backward"] = measure(forward), measure(backward)
    for name, length in (("attention", tokens), ("long_attention", long_tokens)):
        forward, backward, kernel = attention(model, length, device)
        found[f"{name}_forward"], found[f"{name}_backward"] = measure(forward), measure(backward)
        found["kernel"] = kernel
    found["head"] = measure(head(model, tokens, device))
    found["elementwise_bytes_per_second"] = 4 * (elements // 4) / measure(elementwise(elements // 4, device))
    found["adamw_bytes_per_second"] = 28 * (elements // 8) / measure(adamw(elements // 8, device))
    gather, reduce = collectives(block, device)
    received = (dist.get_world_size() - 1) / dist.get_world_size() * block
    found["gather_bytes_per_second"] = 2 * received / measure(gather)
    found["reduce_bytes_per_second"] = 4 * received / measure(reduce)
    found["products_share_beside_gathering"] = beside(measure, products(model, tokens, device)[0], gather, device)
    return found


def block_elements(model: ModelConfig) -> int:
    """Parameters of one transformer block."""
    shallower = model.model_copy(update={"num_hidden_layers": model.num_hidden_layers - 1})
    return count_parameters(model) - count_parameters(shallower)


def products(model: ModelConfig, tokens: int, device: torch.device) -> tuple[Work, Work]:
    """All matrix products of a block, forward; and the two of each in the backward pass."""
    hidden, heads = model.hidden_size, model.head_dim * model.num_attention_heads
    keys, inner = model.head_dim * model.num_key_value_heads, model.intermediate_size
    shapes = [(hidden, heads), (hidden, keys), (hidden, keys), (heads, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    inputs = {size: _random(tokens, size, device=device) for size in {size for shape in shapes for size in shape}}
    weights = [_random(outputs, taken, device=device) * taken**-0.5 for taken, outputs in shapes]

    def forward() -> None:
        for (taken, _), weight in zip(shapes, weights, strict=True):
            inputs[taken] @ weight.T

    def backward() -> None:
        for (taken, outputs), weight in zip(shapes, weights, strict=True):
            inputs[outputs] @ weight
            inputs[outputs].T @ inputs[taken]

    return forward, backward


def attention(model: ModelConfig, tokens: int, device: torch.device) -> tuple[Work, Work, str]:
    """Causal attention over one sequence, forward and backward, and the kernel's name."""
    kernel, _ = select_kernel(
        "auto",
        device_type=device.type,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        head_dim=model.head_dim,
        window=False,
        documents=False,
    )
    attend = KernelAttention(kernel, model)
    counts = (model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads)
    q, k, v = (_random(1, tokens, count, model.head_dim, device=device) for count in counts)
    out, lse, kept = attend.forward(q, k, v, None)
    dout = torch.randn_like(out)
    return (
        lambda: attend.forward(q, k, v, None),
        lambda: attend.backward(dout, q, k, v, out, lse, kept, None),
        kernel.name,
    )


def head(model: ModelConfig, tokens: int, device: torch.device) -> Work:
    """The head's product and loss, forward and backward."""
    hidden = _random(tokens, model.hidden_size, device=device).requires_grad_()
    weight = (_random(model.vocab_size, model.hidden_size, device=device) * 0.02).requires_grad_()
    labels = torch.randint(model.vocab_size, (tokens,), device=device)

    def work() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, labels, compiled=device.type == "cuda").backward()

    return work


def elementwise(elements: int, device: torch.device) -> Work:
    """Reads so many bf16 numbers and writes as many."""
    source, target = (torch.zeros(elements, dtype=torch.bfloat16, device=device) for _ in range(2))
    return lambda: torch.mul(source, 2, out=target)


def adamw(elements: int, device: torch.device) -> Work:
    """An update of fp32 weights: reads weight, gradient and two moments, writes all but the gradient."""
    parameter = torch.nn.Parameter(torch.zeros(elements, device=device))
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([parameter], fused=True).step


def collectives(block: int, device: torch.device) -> tuple[Work, Work]:
    """Gathering a block in bf16, and reducing its gradients in fp32 to one share each."""
    share = -(-block // dist.get_world_size())
    whole = torch.zeros(share * dist.get_world_size(), dtype=torch.bfloat16, device=device)
    gradients, part = whole.float(), torch.zeros(share, device=device)
    mine = torch.zeros(share, dtype=torch.bfloat16, device=device)
    return lambda: dist.all_gather_into_tensor(whole, mine), lambda: dist.reduce_scatter_tensor(part, gradients)


def beside(measure: Stopwatch, work: Work, other: Work, device: torch.device) -> float:
    """The share of its speed that `work` keeps while `other` runs on a second stream all the time. 1 on CPUs."""
    if device.type != "cuda":
        return 1.0
    alone, stream, enough = measure(work), torch.cuda.Stream(), round(2 * measure(work) / measure(other)) + 1
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    shares = []
    for _ in range(20):
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.stream(stream):
            for _ in range(enough):
                other()
        started.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        shares.append(1e3 * alone / started.elapsed_time(ended))
    return statistics.median(shares)


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)


def main() -> None:
    """One rank; rank 0 writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--long-tokens", type=int, default=65536)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each figure")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes the model's shape")
    options = parser.parse_args()
    device = device_of(int(os.environ["LOCAL_RANK"]))
    initialize_distributed(device.type)
    model = load_job(CONFIG, options.set).model
    found = figures(model, options.tokens, options.long_tokens, device, options.seconds)
    found |= {"gpus": dist.get_world_size(), "torch": torch.__version__}
    found["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if dist.get_rank() == 0:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
