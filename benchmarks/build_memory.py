"""Host memory of building a job's model at ZeRO-3: each rank's peak growth against the whole model's bytes.

    python benchmarks/build_memory.py --config configs/llama3-8b-8k.yaml --processes 4 [section.key=value ...]

Runs `launch.build.build_model` (meta device, tensor-parallel cut, fill and partition module by module; no optimizer) in
that many CPU processes. Resident memory is read from /proc (Linux); the peak counts from just before the build.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.config import JobConfig, load_job
from launch.precision import BYTES

GIB = 2**30
PROGRAM = GIB
"""About what a process takes beside the parameters: torch, DeepSpeed, buffers."""
MARGIN = 2 * GIB
"""Left to the rest of the system."""


@dataclass(frozen=True)
class Growth:
    """Bytes on one rank."""

    held: int
    """Parameters that stay after the build."""
    peak: int
    """Largest resident memory during the build, less that before it."""


def main() -> None:
    options = _parse()
    job = load_job(options.config, [*options.overrides, "parallel.zero_stage=3", "job.device=cpu"], options.processes)
    width = BYTES[job.resolve_precision("cpu")]
    whole, tables = width * job.num_parameters, width * _largest_parameter(job)
    _refuse_what_does_not_fit(whole + options.processes * (tables + PROGRAM))
    growths = _build(job, options.processes)
    print(
        f"{job.job.name}: {job.num_parameters:,} parameters, {whole / GIB:.2f} GiB in {job.resolve_precision('cpu')}; "
        f"{job.mesh_shape(options.processes)}, ZeRO-3; largest parameter {tables / GIB:.2f} GiB on a rank"
    )
    print(f"{'rank':>4}  {'held':>9}  {'peak growth':>11}  of the whole")
    for rank, growth in enumerate(growths):
        held, peak = growth.held / GIB, growth.peak / GIB
        print(f"{rank:>4}  {held:>5.2f} GiB  {peak:>7.2f} GiB  {growth.peak / whole:.1%}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def _largest_parameter(job: JobConfig) -> int:
    """Elements of the largest parameter of one rank: it exists whole while it is filled."""
    model, tp = job.model, job.parallel.tensor_parallel_size
    return model.hidden_size * max(model.vocab_size, model.intermediate_size) // tp


def _refuse_what_does_not_fit(needed: int) -> None:
    available = psutil.virtual_memory().available
    if needed + MARGIN > available:
        raise SystemExit(
            f"the build takes about {needed / GIB:.1f} GiB and {MARGIN / GIB:.0f} GiB are kept free, but "
            f"{available / GIB:.1f} GiB are available; lower model.num_hidden_layers"
        )


def _build(job: JobConfig, processes: int) -> list[Growth]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        arguments = [(job.to_yaml(), rank, processes, port) for rank in range(processes)]
        return pool.starmap(_build_on_rank, arguments, chunksize=1)


def _build_on_rank(job_text: str, rank: int, processes: int, port: int) -> Growth:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    from launch.build import build_model
    from parallel.mesh import ParallelMesh
    from parallel.zero import initialize_distributed

    torch.set_num_threads(1)
    initialize_distributed("cpu")
    job = JobConfig.from_yaml(job_text)
    mesh = ParallelMesh.create(job.mesh_shape(processes))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here (proc(5))
    model, _, _ = build_model(job, mesh, torch.device("cpu"))
    dist.barrier()
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    growth = Growth(
        held=sum(tensor.numel() * tensor.element_size() for tensor in tensors), peak=_resident("VmHWM") - before
    )
    dist.barrier()
    dist.destroy_process_group()
    return growth


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    main()
