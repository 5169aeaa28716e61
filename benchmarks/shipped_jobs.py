"""Which of configs/ is for what, as `--check` lays it out, and what a rank by itself takes (`shipped_alone.py`); the
table of docs/choosing.md.

python benchmarks/shipped_jobs.py            # print it
python benchmarks/shipped_jobs.py --write    # renew it in the document
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from documents import markdown, print_or_renew
from launch.config import JobConfig, load_job
from launch.memory.footprint import footprint
from launch.memory.recompute_plan import recompute_plan
from launch.weights.stored_model import write_model
from row_process import load

ROOT = Path(__file__).resolve().parents[1]
CONFIGS, DOCUMENT, MARK = ROOT / "configs", ROOT / "docs" / "choosing.md", "shipped_jobs.py"
MEASURED = ROOT / "docs" / "shipped_alone.json"
SIZES = {"llama3-8b-8k": (8, 16), "llama3-8b-8k-tp2": (16,), "llama3-8b-finetune": (8,), "llama3-8b-64k": (8, 16)}
SIZES |= {"llama3-8b-128k": (8, 32), "llama3-8b-512k": (2,), "llama3-70b-8k": (64,)}
"""GPUs for which each job of a real model is laid out."""


def shipped(name: str, gpus: int, *settings: str) -> JobConfig:
    """The job in configs/, on so many GPUs; one that starts from weights takes the shape of Llama-3-8B's."""
    config = CONFIGS / f"{name}.yaml"
    if "init_from:" not in config.read_text():
        return load_job(config, settings, gpus)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), load_job(CONFIGS / "llama3-8b-8k.yaml").model)
        return load_job(config, [f"model.init_from={folder}", *settings], gpus)


def table() -> str:
    """Markdown: layout, recomputation and estimated peak of each job."""
    heads = ["configs/", "GPUs", "tokens", "tp x cp x dp", "ZeRO", "recomputation", "GiB of a GPU", "measured"]
    measured = load(MEASURED)
    return markdown(
        heads, [_row(name, gpus, measured.get(f"{name} on {gpus}")) for name in SIZES for gpus in SIZES[name]]
    )


def _row(name: str, gpus: int, measured: dict[str, Any] | None) -> list[str]:
    job = shipped(name, gpus)
    mesh = job.mesh_shape(gpus)
    plan = recompute_plan(job, mesh, "cuda")
    needed = footprint(job, mesh, "cuda", plan.policies)
    axes = (mesh.tensor_parallel_size, mesh.context_parallel_size, mesh.data_parallel_size)
    blocks = ", ".join(policy if len(plan.runs) == 1 else f"{policy} in {count}" for policy, count in plan.runs)
    return [
        f"`{name}.yaml`",
        str(gpus),
        f"{job.training.sequence_length:,}",
        " x ".join(map(str, axes)),
        str(job.parallel.zero_stage),
        blocks,
        f"{needed.peak / 2**30:.1f}",
        f"{measured['peak_gib']:.1f}" if measured and str(plan).split(":")[0] in measured["attention"] else "",
    ]


if __name__ == "__main__":
    print_or_renew(DOCUMENT, {MARK: table()})
