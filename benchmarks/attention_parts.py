"""What context-parallel attention is made of: its kernel calls without any communication, and its communication without
any kernel.

    python benchmarks/attention_parts.py [--kernel flash_attn_4]                   # one GPU: the kernel calls
    torchrun --nproc-per-node 2 benchmarks/attention_parts.py                      # two: the messages too

c tokens are half of one rank's share where two ranks hold chunks (0, 3) and (1, 2). An exchange's rank 0 calls c x 4c
and c x c, or both at once as two documents, its rank 1 calls 2c x 3c, all causal; a ring calls 2c x 2c causal and then
a full c x 2c or 2c x c; trading heads calls 4c x 4c causal with half of the heads, once for each group that these are
cut into. The ideal is half of 4c x 4c with all heads. Forward and backward milliseconds, medians; where c is small they
are the host's time, not the GPU's.

Messages are queued behind a pause of the GPU, so that what is timed is the GPUs' part, not the host's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from model.kernels import KERNELS, AttentionKernel, AttentionMask, Documents
from parallel.peer_memory import reach_each_other
from parallel.transport import MessageTransport, SymmetricTransport, Transport

HEAD_DIM = 128
SHAPES = [(32, 8, 1024), (32, 8, 2048), (32, 8, 4096), (32, 8, 8192), (8, 2, 8192), (32, 8, 16384)]
"""Query heads, KV heads, c."""
MEBIBYTES = [1, 8, 64]


@dataclass(frozen=True)
class Call:
    """`queries` x `keys`, in c tokens, aligned at the ends if causal, with one part in `split` of the heads."""

    queries: int
    keys: int
    causal: bool = True
    split: int = 1
    before: tuple[int, int] | None = None
    """Queries and keys of a first document; the rest are a second one."""

    def mask(self, c: int) -> AttentionMask:
        if self.before is None:
            return AttentionMask(causal=self.causal, offset=(self.keys - self.queries) * c if self.causal else 0)
        queries, keys = (
            Documents.from_boundaries([0, first * c, both * c], "cuda")
            for first, both in zip(self.before, (self.queries, self.keys), strict=True)
        )
        return AttentionMask(causal=self.causal, documents=queries, key_documents=keys)

    def __str__(self) -> str:
        heads = f", heads / {self.split}" if self.split > 1 else ""
        if self.before is not None:
            heads += f", the first {self.before[0]}c x {self.before[1]}c apart"
        return f"{self.queries}c x {self.keys}c {'causal' if self.causal else 'full'}{heads}"


WHOLE = Call(4, 4)
MODES = {
    "exchange, rank 0": [Call(1, 4), Call(1, 1)],
    "exchange, rank 0, one call": [Call(2, 5, before=(1, 1))],
    "exchange, rank 1": [Call(2, 3)],
    "ring, rank 0": [Call(2, 2), Call(1, 2, causal=False)],
    "ring, rank 1": [Call(2, 2), Call(2, 1, causal=False)],
    "heads, 1 group": [Call(4, 4, split=2)],
    "heads, 2 groups": [Call(4, 4, split=4)] * 2,
    "heads, 4 groups": [Call(4, 4, split=8)] * 4,
}


def median_ms(action: Callable[[], object], repetitions: int = 15, pause: bool = False) -> float:
    """Median time between events around repeated calls; after a `pause` of the GPU, in which the host gets ahead."""
    for _ in range(3):
        action()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda.synchronize()
    if pause:
        torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in pairwise(marks))


def measure(kernel: AttentionKernel, heads: int, kv_heads: int, c: int, call: Call) -> tuple[float, float]:
    """(forward, backward) of one call, milliseconds."""

    def random(tokens: int, count: int) -> Tensor:
        return torch.randn(1, tokens * c, count // call.split, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    q, dout = random(call.queries, heads), random(call.queries, heads)
    k, v = random(call.keys, kv_heads), random(call.keys, kv_heads)
    mask, scale = call.mask(c), HEAD_DIM**-0.5
    out, lse = kernel.forward(q, k, v, scale, mask)
    return (
        median_ms(lambda: kernel.forward(q, k, v, scale, mask)),
        median_ms(lambda: kernel.backward(dout, q, k, v, out, lse, scale, mask)),
    )


def kernel_parts(kernel: AttentionKernel) -> None:
    """Prints each shape's calls, and what a mode's calls take together."""
    for heads, kv_heads, c in SHAPES:
        print(f"\n{heads}/{kv_heads} heads, {2 * c} tokens per rank: milliseconds forward, backward")
        calls = dict.fromkeys([WHOLE, *(call for calls in MODES.values() for call in calls)])
        times = {call: measure(kernel, heads, kv_heads, c, call) for call in calls if kv_heads % call.split == 0}
        for call, (forward, backward) in times.items():
            print(f"  {str(call):38} {forward:8.3f} {backward:8.3f}")
        ideal = sum(times[WHOLE]) / 2
        for mode, parts in MODES.items():
            if all(call in times for call in parts):
                forward, backward = (sum(times[call][which] for call in parts) for which in (0, 1))
                share = ideal / (forward + backward)
                print(f"  {mode:38} {forward:8.3f} {backward:8.3f}   {share:6.1%} of the ideal {ideal:.3f}", flush=True)


def message_parts() -> None:
    """Prints what a barrier, a copy and an exchange of keys cost between two GPUs, in microseconds."""
    group, rank = dist.group.WORLD, dist.get_rank()
    device = torch.device("cuda", rank)
    transports: list[Transport] = [MessageTransport(group)]
    lines = []
    if reach_each_other(group, device):
        transports.append(SymmetricTransport(group, device))
        memory = symmetric_memory.empty(MEBIBYTES[-1] * 2**20, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(memory, group)
        peer = handle.get_buffer((rank + 1) % group.size(), memory.shape, memory.dtype)
        lines.append(("barrier over symmetric memory", 0, median_ms(lambda: handle.barrier(channel=0), pause=True)))
        mine = torch.empty_like(memory)
        for mebibytes in MEBIBYTES:
            size = mebibytes * 2**20
            copy = median_ms(lambda size=size: mine[:size].copy_(peer[:size]), pause=True)
            lines.append(("copy from the peer's memory", mebibytes, copy))
    for mebibytes in MEBIBYTES:
        sent, received = (torch.empty(mebibytes * 2**20, dtype=torch.uint8, device=device) for _ in range(2))
        trade = median_ms(lambda one=sent, other=received: dist.all_to_all_single(other, one), pause=True)
        lines.append(("NCCL all_to_all", mebibytes, trade))
        for transport in transports:
            swap = median_ms(lambda t=transport, like=sent, to=received: _swap(t, like, to), pause=True)
            lines.append((f"exchange {transport.name}", mebibytes, swap))
    for what, mebibytes, milliseconds in lines if rank == 0 else []:
        rate = f"{mebibytes * 2**20 / milliseconds / 1e6:6.0f} GB/s" if mebibytes else ""
        size = f"{mebibytes} MiB" if mebibytes else ""
        print(f"{what:48} {size:7} {1e3 * milliseconds:8.1f} us {rate}", flush=True)


def _swap(transport: Transport, like: Tensor, into: Tensor) -> None:
    """Each of two ranks takes the whole of the other's slot, as an exchange of keys would."""
    slot = transport.slot(like.shape, like)

    def taken(owner: int, reader: int) -> list[slice]:
        return [slice(0, len(like))]

    def place(owner: int, parts: list[Tensor]) -> None:
        for part in parts:
            into.copy_(part)

    transport.exchange(slot, taken, place).wait()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="flash_attn_4")
    kernel = KERNELS[parser.parse_args().kernel]
    if not dist.is_torchelastic_launched():
        kernel_parts(kernel)
        return
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    dist.all_reduce(torch.zeros(1, device="cuda"))
    message_parts()
    if dist.get_rank() == 0:
        kernel_parts(kernel)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
