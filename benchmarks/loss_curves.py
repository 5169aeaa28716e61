"""Loss curves of a 1B model by layout: two ranks against one.

    python benchmarks/loss_curves.py --output docs/loss_curves.json [--curves REGEX] [--again]
    python benchmarks/loss_curves.py --output docs/loss_curves.json --merge other.json ... [--document docs]

A 0.97-billion-parameter model (Llama-3.2-1B's blocks, bytes for tokens) learns the Python standard library's source for
200 steps of 8,192 tokens in bf16. All curves start from the same weights and read the same tokens in the same order,
so that they differ by rounding alone. How far rounding carries them is measured: one GPU runs again with another
attention kernel, and again with other micro-batches. A layout is within bf16 noise where its root-mean-square
difference from one GPU is at most twice the largest of those.

Curves run one after the other through torchrun; one that the output holds is left out. `--set` changes the job. Where
there is only one GPU, two ranks share it: what they compute is the same, their time means nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ringzero_row
from documents import markdown
from gpu_sharing import gpu_of
from launch.config import load_job
from launch.data.bigram import conditional_bigram_entropy
from launch.data.corpora import fresh_cursor, load_corpora, training_batches
from row_process import Results, load, results_parser, save, torchrun
from workload import timed_steps

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
MODEL = [
    "model.hidden_size=2048",
    "model.intermediate_size=8192",
    "model.num_hidden_layers=16",
    "model.num_attention_heads=32",
    "model.num_key_value_heads=8",
    "model.qk_norm=false",
    "model.tie_word_embeddings=false",
    "model.rope_theta=500000.0",
]
TRAINING = [
    "optimizer.learning_rate=3e-4",
    "training.sequence_length=2048",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "training.max_steps=200",
]
_ONE_RANK = ["parallel.tensor_parallel_size=1", "parallel.context_parallel_size=1"]
PAGE = """# Loss curves by layout

Does training on two ranks learn what one GPU learns? All runs start from the same weights and read the same tokens in
the same order, so they differ only by rounding. The model has 0.97 billion parameters (the blocks of Llama-3.2-1B,
bytes for tokens). It learns the Python standard library's source for 200 steps of 8,192 tokens, in bf16 on NVIDIA
H200s.

    python benchmarks/loss_curves.py --output docs/loss_curves.json
    python benchmarks/loss_curves.py --output docs/loss_curves.json --document docs

![Loss curves, and their differences from one GPU](loss_curves.svg)

"Noise" is how far rounding alone carries a run. It is measured on one GPU, with another attention kernel and with other
micro-batches, which add gradients in another order. A layout is within bf16 noise if its root-mean-square difference
from one GPU, over all steps, is at most twice the larger of those two.

Where two ranks shared one GPU, NCCL sent messages through sockets (`benchmarks/gpu_sharing.py`). What a rank computes
does not depend on that; how long a step takes does.
"""


@dataclass(frozen=True)
class Curve:
    processes: int
    settings: list[str]
    noise: bool = False
    """One GPU again, with other rounding."""


BASELINE = "one GPU"
CURVES = {
    BASELINE: Curve(1, _ONE_RANK),
    "one GPU, another kernel": Curve(1, [*_ONE_RANK, "model.attention_backend=torch_flash"], noise=True),
    "one GPU, micro-batch 1": Curve(1, [*_ONE_RANK, "training.micro_batch_size=1"], noise=True),
    "two ranks, ZeRO-3": Curve(2, _ONE_RANK),
    "two ranks, cp 2": Curve(2, ["parallel.tensor_parallel_size=1", "parallel.context_parallel_size=2"]),
    "two ranks, tp 2": Curve(2, ["parallel.tensor_parallel_size=2", "parallel.context_parallel_size=1"]),
}


def main() -> None:
    """Command line: the driver, or (with --curve) one curve's rank."""
    parser = results_parser(__doc__, "curve", timeout=590, document="FOLDER")
    parser.add_argument("--curves", default="", help="regular expression on the names of curves")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="FILE")
    options = parser.parse_args()
    if options.curve:
        _run(options)
        return
    if options.merge:
        results = {name: curve for path in [options.output, *options.merge] for name, curve in load(path).items()}
        save(results, options.output)
    elif not (options.document or options.table):
        for name, curve in CURVES.items():
            if re.search(options.curves, name) and (options.again or name not in load(options.output)):
                _start(name, curve.processes, options)
    results = load(options.output)
    print(table(results))
    if options.document:
        (options.document / "loss_curves.md").write_text(page(results))
        plot(results, options.document / "loss_curves.svg")


def page(results: Results) -> str:
    """All of docs/loss_curves.md."""
    return f"{PAGE}\n{table(results)}\n"


def table(results: Results) -> str:
    """Markdown: each curve beside the baseline. Raises ValueError where curves read different corpora."""
    if len({curve["corpus"] for curve in results.values()}) > 1:
        raise ValueError("these curves read different corpora; run them with one Python interpreter's library")
    if BASELINE not in results:
        return f"{BASELINE!r} is missing: nothing to compare with"
    lines = []
    noise = max((_rms(results, name) for name in results if CURVES[name].noise), default=math.nan)
    for name in (name for name in CURVES if name in results):
        curve, rms = results[name], _rms(results, name)
        largest = max(map(abs, differences(results, name)))
        verdict = "" if name == BASELINE else "noise" if CURVES[name].noise else f"{rms / noise:.2f} x the noise"
        figures = [f"{curve['losses'][0]:.5f}", f"{statistics.mean(curve['losses'][-20:]):.4f}", f"{rms:.2e}"]
        shared = curve["gpus"] < CURVES[name].processes
        seconds = "shared" if shared else f"{statistics.median(curve['all_seconds']):.3f}"
        figures += [f"{largest:.2e}", seconds, verdict]
        lines.append([name, str(curve["gpus"]), curve["kernel"], *figures])
    columns = ["run", "GPUs", "kernel", "loss, step 1", "last 20 steps", "RMS difference", "largest", "s/step", ""]
    entropy = results[BASELINE]["bigram_entropy"]
    remarks = f"Bigram entropy of the text: {entropy:.4f} nats per byte."
    if missing := [name for name in CURVES if name not in results]:
        remarks += f" Not measured yet: {'; '.join(missing)}."
    return f"{markdown(columns, lines)}\n\n{remarks}"


def differences(results: Results, name: str) -> list[float]:
    """Step by step, from the baseline."""
    pairs = zip(results[name]["losses"], results[BASELINE]["losses"], strict=True)
    return [loss - reference for loss, reference in pairs]


def _rms(results: Results, name: str) -> float:
    return math.sqrt(statistics.mean(difference**2 for difference in differences(results, name)))


def plot(results: Results, path: Path) -> None:
    """Curves above, differences from the baseline below with the noise as a band."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    noise = [differences(results, name) for name in results if CURVES[name].noise]
    band = [max(map(abs, step)) for step in zip(*noise, strict=True)]
    steps = range(1, len(band) + 1)
    for number, name in enumerate(name for name in CURVES if name in results):
        above.plot(steps, results[name]["losses"], label=name, linewidth=1, color=f"C{number}")
        if name != BASELINE and not CURVES[name].noise:
            below.plot(steps, differences(results, name), linewidth=1, color=f"C{number}")
    below.fill_between(steps, [-x for x in band], band, alpha=0.3, color="grey", label="one GPU, other rounding")
    above.set_ylabel("loss, nats per byte")
    below.set_ylabel("difference from one GPU")
    below.set_xlabel("step")
    above.legend(fontsize="small")
    below.legend(fontsize="small", loc="upper left")
    figure.savefig(path, metadata={"Date": None})


def _start(name: str, processes: int, options: argparse.Namespace) -> None:
    """Starts one curve; its process writes the result."""
    arguments = ["--curve", name, "--output", str(options.output), *(["--set", *options.set] if options.set else [])]
    print(f"-- {name}", flush=True)
    log = options.output.with_suffix(f".{re.sub('[^a-z0-9]+', '-', name.lower())}.log")
    if reason := torchrun(__file__, arguments, processes, log, options.timeout):
        print(f"{reason}; see {log}", flush=True)


def _run(options: argparse.Namespace) -> None:
    """This process is one rank of a curve."""
    curve = CURVES[options.curve]
    job = load_job(CONFIG, [*MODEL, *TRAINING, *curve.settings, *options.set])
    rank = int(os.environ["LOCAL_RANK"])
    device = gpu_of(rank, curve.processes) if torch.cuda.is_available() else torch.device("cpu")
    corpora = load_corpora(job)

    batches_of = partial(training_batches, corpora, job, fresh_cursor(corpora, job))
    train_step, note = ringzero_row.prepared(job, job.total_steps, device, batches_of)
    found = timed_steps(train_step, job.total_steps)
    if torch.distributed.get_rank() == 0:
        validation = corpora.validation
        about = {
            "gpus": min(curve.processes, torch.cuda.device_count()),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "kernel": re.sub(r".*attention kernel (\w+):.*", r"\1", note),
            "settings": [*curve.settings, *options.set],
            "corpus": corpora.training_fingerprint,
            "bigram_entropy": conditional_bigram_entropy(validation.read(0, min(len(validation), 1 << 20))),
        }
        save(load(options.output) | {options.curve: about | found}, options.output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
