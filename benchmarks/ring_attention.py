"""Context-parallel attention against the same kernel on one GPU, and against its peers, on the GPUs of one node.

    torchrun --nproc-per-node 2 benchmarks/ring_attention.py --output docs/ring_attention.json
        [--rows REGEX] [--peers] [--kernel flash_attn_4] [--shard 1/3]

Every row is forward + backward of causal attention in bf16, head_dim 128, batch 1. Times are the slowest rank's median
over repetitions; the ideal is the same kernel on one GPU over the whole sequence, divided by the number of GPUs. Packed
rows hold documents of lengths drawn from a log-normal distribution (`document_lengths`), the same for all. A shard runs
its part of the rows and the anchor row; results are merged into the output file by row name, so an interrupted run goes
on where it stopped (`--again` measures anew). `--table` prints the file's contents as Markdown and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.kernels import KERNELS, AttentionOperator, Documents, KernelOperator
from parallel.exchange import ExchangeAttention
from parallel.recorded import RecordedAttention
from parallel.ring import RingAttention
from parallel.transport import Transport, make_transport
from parallel.ulysses import UlyssesAttention

HEAD_DIM = 128
ROUNDS = 5
ONE_GPU = "one GPU, whole sequence"


@dataclass(frozen=True)
class Row:
    """One shape: query/KV heads, tokens of one rank, a window (0: none) and a seed of document lengths (0: none)."""

    heads: int
    key_value_heads: int
    local_tokens: int
    window: int = 0
    documents: int = 0

    @property
    def name(self) -> str:
        window = f", window {self.window}" if self.window else ""
        packed = f", documents of seed {self.documents}" if self.documents else ""
        return (
            f"{self.heads}/{self.key_value_heads} heads, {self.local_tokens // 1024}k tokens per rank{window}{packed}"
        )

    def boundaries(self) -> list[int]:
        """Where the documents of the whole sequence begin, and its end."""
        length = self.local_tokens * dist.get_world_size()
        return [0, *itertools.accumulate(document_lengths(length, self.documents))] if self.documents else [0, length]

    @property
    def flops(self) -> float:
        """Of a forward pass over the whole sequence: 4 x heads x head_dim x visible pairs."""
        pairs = 0
        for start, end in itertools.pairwise(self.boundaries()):
            length, reach = end - start, min(self.window or end - start, end - start)
            pairs += reach * (reach + 1) // 2 + (length - reach) * reach
        return 4.0 * self.heads * HEAD_DIM * pairs


def document_lengths(total: int, seed: int) -> list[int]:
    """Long-tailed: exp of a normal distribution, median 1,024 tokens, sigma 1.2; the last one is cut to fit."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(1, round(draw.lognormvariate(math.log(1024), 1.2)))))
    return lengths


ANCHOR = Row(32, 8, 8192)


def all_rows() -> list[Row]:
    """The grid: heads x lengths x masks; the anchor first."""
    heads = [(32, 8), (16, 4), (8, 2), (32, 32)]
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    masks = [(0, 0), (1024, 0), (4096, 0), (0, 1), (0, 2), (0, 3)]
    rows = [Row(*pair, length, *mask) for pair in heads for length in lengths for mask in masks]
    return [ANCHOR] + [row for row in rows if row != ANCHOR]


@dataclass(frozen=True)
class Contestant:
    """One way to attend: over q [1, L, heads, 128], k and v of `tokens` tokens, inside `context`."""

    name: str
    tokens: int
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def contestants(row: Row, kernel_name: str, with_peers: bool) -> list[Contestant]:
    """One GPU on the whole sequence first, then our modes, then peers."""
    kernel, group, window = KERNELS[kernel_name], dist.group.WORLD, row.window or None
    documents = Documents.from_boundaries(row.boundaries(), "cuda") if row.documents else None
    settings: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "window": window}
    whole = KernelOperator(kernel, **settings)

    def entry(name: str, operator: AttentionOperator, tokens: int = row.local_tokens) -> Contestant:
        return Contestant(name, tokens, lambda q, k, v: operator(q, k, v, documents))

    found = [entry(ONE_GPU, whole, row.local_tokens * dist.get_world_size())]
    for head_groups in (1, 2, 4):
        if row.key_value_heads % (head_groups * dist.get_world_size()) == 0:
            name = f"heads, {head_groups} group{'s' * (head_groups > 1)}"
            found.append(entry(name, UlyssesAttention(transport(), whole, head_groups=head_groups)))
    if row.key_value_heads % dist.get_world_size() == 0 and row.local_tokens <= 8192 and not row.documents:
        plain, recorded = (UlyssesAttention(transport(number), whole) for number in (0, 1))
        found.append(entry("heads, CUDA graphs", RecordedAttention(plain, recorded)))
        by_keys = (ExchangeAttention(transport(number), kernel, **settings) for number in (0, 2))
        found.append(entry("exchange, CUDA graphs", RecordedAttention(*by_keys)))
    found.append(entry("exchange", ExchangeAttention(transport(), kernel, **settings)))
    found.append(entry("zigzag ring", RingAttention(group, kernel, **settings)))
    return found + (peers(row) if with_peers and not window and not row.documents else [])


@cache
def transport(number: int = 0) -> Transport:
    """For all rows: its memory grows to the largest. Graphs need one of their own."""
    return make_transport(dist.group.WORLD, torch.device("cuda", dist.get_rank()))


def peers(row: Row) -> list[Contestant]:
    """Other libraries, each at its best settings; one that is not installed is named and left out."""
    found = []
    try:
        import transformers.modeling_flash_attention_utils as utilities

        # ring-flash-attn 0.1.8 imports this name, which transformers 5 dropped, for an adapter that is not used here
        utilities.is_flash_attn_greater_or_equal_2_10 = lambda: True
        from ring_flash_attn import stripe_flash_attn_func, zigzag_ring_flash_attn_func
    except ImportError as error:
        if dist.get_rank() == 0:
            print(f"ring-flash-attn left out: {error}")
    else:
        for name, function in (("zigzag", zigzag_ring_flash_attn_func), ("stripe", stripe_flash_attn_func)):
            found.append(Contestant(f"ring-flash-attn {name} (FA2)", row.local_tokens, partial(function, causal=True)))
    found.append(Contestant("torch context_parallel (cuDNN)", row.local_tokens, _sdpa, _torch_context))
    return found


@contextlib.contextmanager
def _torch_context() -> Iterator[None]:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    unused = torch.zeros(2 * dist.get_world_size(), device="cuda")  # it insists on something to shard
    with context_parallel(mesh, buffers=[unused], buffer_seq_dims=[0]), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # repeating KV by hand was slower at every length
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


class Measurement:
    """One contestant on its inputs: warmed up once, then timed a round at a time."""

    def __init__(self, contestant: Contestant, row: Row):
        self.contestant = contestant
        self.q, self.k, self.v, self.gradient = tensors(row, contestant.tokens)
        self.rounds: dict[str, list[float]] = {"forward": [], "forward_backward": []}
        with contestant.context():
            for _ in range(3):
                self.both()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with contestant.context():
            self.both()
        self.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30

    def forward(self) -> Tensor:
        return self.contestant.attend(self.q, self.k, self.v)

    def both(self) -> None:
        self.q.grad = self.k.grad = self.v.grad = None
        self.forward().backward(self.gradient)

    def round(self, repetitions: int) -> None:
        """Adds one round's medians."""
        with self.contestant.context():
            with torch.no_grad():
                self.rounds["forward"].append(_median(self.forward, repetitions))
            self.rounds["forward_backward"].append(_median(self.both, repetitions))

    def result(self) -> dict[str, float]:
        """Median over the rounds, of the slowest rank; milliseconds and GiB beyond the inputs."""
        values = [statistics.median(self.rounds[kind]) for kind in self.rounds] + [self.peak_gib]
        slowest = torch.tensor(values, device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return dict(zip([*self.rounds, "peak_gib"], slowest.tolist(), strict=True))


def _median(action: Callable[[], object], repetitions: int) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 2)]
    dist.barrier()
    torch.cuda.synchronize()
    for mark in marks:
        mark.record()
        action()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(next_one) for one, next_one in itertools.pairwise(marks[1:]))


def measure_row(row: Row, kernel_name: str, with_peers: bool) -> dict[str, Any]:
    """All contestants on one shape, in turns: the GPU's clock drifts with its temperature, ratios must not."""
    size, modes = dist.get_world_size(), {}
    running: list[Measurement] = []
    for contestant in contestants(row, kernel_name, with_peers):
        try:
            running.append(Measurement(contestant, row))
        except (RuntimeError, NotImplementedError, ValueError, AssertionError, KeyError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            modes[contestant.name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    repetitions = max(4, min(20, (32768 // row.local_tokens) * 5 * 32 // row.heads))
    for _ in range(ROUNDS):
        for measurement in running:
            measurement.round(repetitions)
    results = {measurement.contestant.name: measurement.result() for measurement in running}
    single = results.pop(ONE_GPU)
    for measured in results.values():
        measured["share_of_ideal"] = single["forward_backward"] / size / measured["forward_backward"]
        measured["share_of_ideal_forward"] = single["forward"] / size / measured["forward"]
    return {"row": asdict(row), "gpus": size, "kernel": kernel_name, "one_gpu": single, "modes": modes | results}


def table(results: dict[str, Any]) -> str:
    """Markdown: one line per row and mode."""
    columns = ["shape", "kernel", "mode", "forward ms", "forward + backward ms", "share of the ideal, forward"]
    columns += ["share of the ideal", "peak GiB"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for key, result in results["rows"].items():
        shape = key.rpartition(" / ")[0]
        single = result["one_gpu"]
        whole = [f"{single['forward']:.2f}", f"{single['forward_backward']:.2f}", "", "", f"{single['peak_gib']:.2f}"]
        lines.append(_line([shape, result["kernel"], ONE_GPU, *whole]))
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
