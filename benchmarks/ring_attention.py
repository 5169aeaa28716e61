"""Context-parallel attention against the same kernel on one GPU, and against its peers, on the GPUs of one node.

    torchrun --nproc-per-node 2 benchmarks/ring_attention.py --output docs/ring_attention.json
        [--rows REGEX] [--peers] [--kernel flash_attn_4] [--shard 1/3]

Every row is forward + backward of causal attention in bf16, head_dim 128, batch 1. Times are the slowest rank's median
over repetitions; the ideal is the same kernel on one GPU over the whole sequence, divided by the number of GPUs. A
shard runs its part of the rows and the anchor row; results are merged into the output file by row name, so an
interrupted run goes on where it stopped (`--again` measures anew). `--table` prints the file's contents as Markdown and
measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.kernels import AttentionMask, attention
from model.kernels.select import KERNELS
from parallel.exchange import ExchangeAttention
from parallel.ring import RingAttention

HEAD_DIM = 128


@dataclass(frozen=True)
class Row:
    """One shape: query/KV heads, tokens of one rank, and a window (0: none)."""

    heads: int
    key_value_heads: int
    local_tokens: int
    window: int = 0

    @property
    def name(self) -> str:
        window = f" window {self.window}" if self.window else ""
        return f"{self.heads}/{self.key_value_heads} heads, {self.local_tokens // 1024}k tokens per rank{window}"


ANCHOR = Row(32, 8, 8192)


def all_rows() -> list[Row]:
    """The grid: heads x lengths x masks; the anchor first."""
    heads = [(32, 8), (16, 4), (8, 2), (32, 32)]
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    rows = [Row(*pair, length, window) for pair in heads for length in lengths for window in (0, 1024, 4096)]
    return [ANCHOR] + [row for row in rows if row != ANCHOR]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def contestants(row: Row, kernel_name: str, with_peers: bool) -> Iterator[tuple[str, Attend]]:
    """(name, attention over the local tensors [1, L, heads, 128])."""
    kernel, group, scale = KERNELS[kernel_name], dist.group.WORLD, HEAD_DIM**-0.5
    window = row.window or None
    for head_groups in (1, 2, 4):
        if row.key_value_heads % head_groups == 0:
            exchange = ExchangeAttention(group, kernel, scale=scale, window=window, head_groups=head_groups)
            yield f"exchange, {head_groups} head groups", lambda q, k, v, a=exchange: a(q, k, v, None)
    ring = RingAttention(group, kernel, scale=scale, window=window)
    yield "zigzag ring", lambda q, k, v: ring(q, k, v, None)
    if with_peers and not window:
        yield from peers(row)


def peers(row: Row) -> Iterator[tuple[str, Attend]]:
    """Other libraries, each at its best settings; one that is not installed is named and left out."""
    try:
        import transformers.modeling_flash_attention_utils as utilities

        # ring-flash-attn 0.1.8 imports this name, which transformers 5 dropped, for an adapter that is not used here
        utilities.is_flash_attn_greater_or_equal_2_10 = lambda: True
        from ring_flash_attn import stripe_flash_attn_func, zigzag_ring_flash_attn_func
    except ImportError as error:
        if dist.get_rank() == 0:
            print(f"ring-flash-attn left out: {error}")
    else:
        yield "ring-flash-attn zigzag (FA2)", lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True)
        yield "ring-flash-attn stripe (FA2)", lambda q, k, v: stripe_flash_attn_func(q, k, v, causal=True)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    with context_parallel(mesh), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        repeats = row.heads // row.key_value_heads
        yield "torch context_parallel (cuDNN, enable_gqa)", partial(_sdpa, repeats=1)
        yield "torch context_parallel (cuDNN, KV repeated)", partial(_sdpa, repeats=repeats)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return attended.transpose(1, 2)


def tensors(row: Row, length: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    shapes = [row.heads, row.key_value_heads, row.key_value_heads, row.heads]
    made = [
        torch.randn(1, length, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
        for heads in shapes
    ]
    return [tensor.requires_grad_() for tensor in made[:3]] + made[3:]


def measure(attend: Attend, inputs: list[Tensor], repetitions: int) -> dict[str, float]:
    """Median milliseconds of forward and of forward + backward, the slowest rank's, and peak GiB beyond the inputs."""
    q, k, v, gradient = inputs

    def both() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(gradient)

    for _ in range(3):
        both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = {"forward": _median(lambda: attend(q, k, v), repetitions), "forward_backward": _median(both, repetitions)}
    times["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    slowest = torch.tensor(list(times.values()), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(times, slowest.tolist(), strict=True))


def _median(action: Callable[[], object], repetitions: int) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    dist.barrier()
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False))


def measure_row(row: Row, kernel_name: str, with_peers: bool) -> dict[str, Any]:
    """All contestants on one shape, and the ideal."""
    size = dist.get_world_size()
    kernel, window = KERNELS[kernel_name], row.window or None
    whole = tensors(row, row.local_tokens * size)
    repetitions = max(5, min(30, 200_000 // (row.local_tokens * row.local_tokens // 2**20 + 1) // row.heads))
    single = measure(
        lambda q, k, v: attention(
            q, k, v, kernel=kernel, scale=HEAD_DIM**-0.5, mask=AttentionMask(causal=True, window=window)
        ),
        whole,
        repetitions,
    )
    del whole
    result: dict[str, Any] = {"row": asdict(row), "gpus": size, "kernel": kernel_name, "one_gpu": single, "modes": {}}
    for name, attend in contestants(row, kernel_name, with_peers):
        local = tensors(row, row.local_tokens)
        try:
            measured = measure(attend, local, repetitions)
        except (RuntimeError, NotImplementedError, ValueError, AssertionError, KeyError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            result["modes"][name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        measured["share_of_ideal"] = single["forward_backward"] / size / measured["forward_backward"]
        measured["share_of_ideal_forward"] = single["forward"] / size / measured["forward"]
        result["modes"][name] = measured
    return result


def table(results: dict[str, Any]) -> str:
    """Markdown: one line per row and mode."""
    columns = ["shape", "kernel", "mode", "forward ms", "forward + backward ms", "share of the ideal, forward"]
    columns += ["share of the ideal", "peak GiB"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for key, result in results["rows"].items():
        shape = key.rpartition(" / ")[0]
        single = result["one_gpu"]
        whole = [f"{single['forward']:.2f}", f"{single['forward_backward']:.2f}", "", "", f"{single['peak_gib']:.2f}"]
        lines.append(_line([shape, result["kernel"], "one GPU, whole sequence", *whole]))
        for mode, measured in result["modes"].items():
            if "failed" in measured:
                lines.append(_line(["", "", mode, measured["failed"], "", "", "", ""]))
                continue
            times = [f"{measured['forward']:.3f}", f"{measured['forward_backward']:.3f}"]
            shares = [f"{measured['share_of_ideal_forward']:.1%}", f"{measured['share_of_ideal']:.1%}"]
            lines.append(_line(["", "", mode, *times, *shares, f"{measured['peak_gib']:.2f}"]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", default="", help="regular expression on row names")
    parser.add_argument("--kernel", default="flash_attn_4")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure rows anew that the output file holds")
    parser.add_argument("--shard", default="1/1", help="I/N: the I-th of N parts, from 1")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {"rows": {}}
    if options.table:
        print(table(results))
        return
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    dist.all_reduce(torch.zeros(1, device="cuda"))  # makes the communicator before anything is timed
    index, count = map(int, options.shard.split("/"))
    rows = [row for row in all_rows() if re.search(options.rows, row.name)]
    for row in [ANCHOR] * (count > 1) + rows[index - 1 :: count]:
        key = f"{row.name} / {options.kernel}"
        if key in results["rows"] and not options.again:
            continue
        result = measure_row(row, options.kernel, options.peers)
        if dist.get_rank() == 0:
            results["gpu"], results["torch"] = torch.cuda.get_device_name(), torch.__version__
            results["rows"][key] = result
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1))
            print(table({"rows": {key: result}}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
