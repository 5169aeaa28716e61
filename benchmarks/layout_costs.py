"""What a layout costs: memory of one rank, and bytes that it sends. Prints the table of docs/parallelism.md.

    python benchmarks/layout_costs.py            # print it
    python benchmarks/layout_costs.py --write    # renew it in the document

Memory is `launch.memory.formulas`'s estimate. Traffic is computed from the payloads below, which a test counts in real
worlds, and the share of a payload that each rank sends in a ring algorithm: over m ranks (m - 1) / m of it in an
all-gather or a reduce-scatter, twice that in an all-reduce.

Letters as in `launch.memory.formulas`; L num_hidden_layers, P context_parallel_size, N parameters on a tensor-parallel
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from documents import markdown, print_or_renew
from launch.config import load_job
from launch.memory.parameters import count_parameters
from launch.memory.recompute_plan import planned_footprint
from launch.precision import BYTES, Precision
from model.config import ModelConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "parallelism.md"
MARK = "layout_costs.py"
GPUS_8K, GPUS_128K = 8, 32
LAYOUTS_8K = [(1, 1, stage) for stage in range(4)] + [(2, 1, 1), (2, 1, 2), (2, 1, 3), (8, 1, 1), (1, 2, 3), (2, 2, 2)]
LAYOUTS_128K = [(2, 8, 3), (4, 8, 2), (8, 4, 2), (2, 16, 3), (1, 32, 3)]


@dataclass(frozen=True)
class Payload:
    """Bytes handed to collectives by one rank; of a gathering or scattering one, those of the whole."""

    all_reduced: int = 0
    all_gathered: int = 0
    reduce_scattered: int = 0

    def sent(self, ranks: int) -> float:
        """By each rank, in a ring algorithm."""
        return (2 * self.all_reduced + self.all_gathered + self.reduce_scattered) * (ranks - 1) / ranks


def tensor_payload(
    model: ModelConfig, tokens: int, width: int, *, tp: int, checkpointing: bool, sequence_parallel: bool
) -> Payload:
    """What one micro-batch moves over tp.

    Regions: two in a layer, the embedding's and the head's, half each. Each is left once forward and entered once
    backward, a sum of t E b; under sequence parallelism it is entered forward and left backward too, and what was a
    sum is one part of it each. A layer computed again enters both regions and leaves the first; the second's output is
    not needed. The loss takes three fp32 numbers of each token from each rank; sequence parallelism sums the gradients
    of norms, which see a part of the tokens.
    """
    stream, layers = tokens * model.hidden_size * width, model.num_hidden_layers
    loss = 12 * tokens * tp
    if not sequence_parallel:
        return Payload(all_reduced=(layers * (5 if checkpointing else 4) + 2) * stream, all_gathered=loss)
    entered, left = 2 * layers + 1, 2 * layers + 1
    return Payload(
        all_reduced=(2 * layers + 1) * model.hidden_size * width,
        all_gathered=(entered + left + (2 * layers if checkpointing else 0)) * stream + loss,
        reduce_scattered=(entered + left + (layers if checkpointing else 0)) * stream,
    )


def ring_payload(model: ModelConfig, tokens: int, width: int, *, tp: int, cp: int, checkpointing: bool) -> int:
    """Bytes sent by one rank around the ring for one micro-batch.

    Keys and values forward, again backward, and again where the forward pass is computed again, P - 1 hops each; dK
    and dV in fp32, P hops.
    """
    passes = 3 if checkpointing else 2
    return _keys(model, tokens, tp) * (passes * (cp - 1) * width + cp * 4)


def exchange_payload(model: ModelConfig, tokens: int, width: int, *, tp: int, cp: int, checkpointing: bool) -> float:
    """Bytes sent by one rank, the mean over the ranks, in the exchange of keys for one micro-batch, without window and
    documents.

    A query chunk needs no keys of its future, so that a rank fetches those of 3/4 (P - 1) t tokens: forward, again
    where the forward pass is computed again, and again backward for P > 2; dK and dV of as many go back.
    """
    passes = 2 + checkpointing + (cp > 2)
    return _keys(model, tokens, tp) * passes * 0.75 * (cp - 1) * width


def _keys(model: ModelConfig, tokens: int, tp: int) -> int:
    """Elements of keys and values of all layers."""
    return model.num_hidden_layers * 2 * tokens * model.head_dim * (model.num_key_value_heads // tp)


def zero_payloads(
    parameters: int, stage: int, precision: Precision, head: int, reduced: int = 4
) -> tuple[Payload, Payload]:
    """What DeepSpeed 0.19 moves for one micro-batch, and what once a step; gradients in numbers of `reduced` bytes.

    Stage 3 for a model larger than its limit of live parameters; below it, parameters stay gathered for backward, as
    the `head` elements of the last module always do.
    """
    size, gradients = parameters * BYTES[precision], parameters * reduced
    if stage == 0:
        return Payload(), Payload(all_reduced=gradients)
    if stage == 1:
        return Payload(), Payload(all_reduced=gradients, all_gathered=size)
    if stage == 2:
        return Payload(all_reduced=gradients), Payload(all_gathered=size)
    return Payload(all_gathered=2 * size - head * BYTES[precision], reduce_scattered=gradients), Payload()


def table() -> str:
    """Markdown: the shape of Llama-3 8B in bf16 at 8,192 and at 131,072 tokens, micro-batches of one sequence."""
    names = ["GPUs", "tokens", "tp x cp x dp", "ZeRO", "recompute", "states", "activations", "peak"]
    names += ["tp", "cp exchange", "cp ring", "ZeRO", "ZeRO a step"]
    rows = []
    short, long = CONFIGS / "llama3-8b-8k.yaml", CONFIGS / "llama3-8b-128k.yaml"
    for tp, cp, stage in LAYOUTS_8K:
        for checkpointing in ("none", "full"):
            rows.append(_row(short, GPUS_8K, tp, cp, stage, checkpointing))
    rows += [_row(long, GPUS_128K, tp, cp, stage, "full") for tp, cp, stage in LAYOUTS_128K]
    return markdown(names, rows)


def _row(config: Path, gpus: int, tp: int, cp: int, stage: int, recompute: str) -> list[str]:
    sizes = [f"parallel.tensor_parallel_size={tp}", f"parallel.context_parallel_size={cp}"]
    job = load_job(
        config, [*sizes, f"parallel.zero_stage={stage}", f"training.activation_checkpointing={recompute}"], gpus
    )
    mesh, precision = job.mesh_shape(gpus), job.resolve_precision("cuda")
    width, local, zero_size = BYTES[precision], count_parameters(job.model, tp), mesh.data_parallel_size * cp
    tokens = job.training.micro_batch_size * job.training.sequence_length // cp
    head = job.model.hidden_size * job.model.vocab_size // tp
    whole = planned_footprint(job, mesh, "cuda")
    states, activations = whole.states.total + whole.working, whole.activations.peak
    checkpointing = recompute == "full"
    over_tp = tensor_payload(
        job.model, tokens, width, tp=tp, checkpointing=checkpointing, sequence_parallel=job.sequence_parallel
    ).sent(tp)
    over_cp = [
        payload(job.model, tokens, width, tp=tp, cp=cp, checkpointing=checkpointing) if cp > 1 else 0
        for payload in (exchange_payload, ring_payload)
    ]
    each, once = (payload.sent(zero_size) for payload in zero_payloads(local, stage, precision, head))
    return [
        str(gpus),
        f"{job.training.sequence_length:,}",
        f"{tp} x {cp} x {mesh.data_parallel_size}",
        str(stage),
        recompute,
        *(f"{size / 2**30:.1f}" for size in (states, activations, states + activations)),
        *(f"{size / 1e9:.1f}" if size else "-" for size in (over_tp, *over_cp, each, once)),
    ]


if __name__ == "__main__":
    print_or_renew(DOCUMENT, {MARK: table()})
