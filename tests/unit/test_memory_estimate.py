"""The memory that `--check` promises: against formulas by hand, and against what a model on this machine takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from free_messages import alone
from launch.config import load_job
from launch.context_plan import ContextPlan
from launch.memory import formulas
from launch.memory.footprint import footprint
from launch.memory.formulas import Activations, estimate_activations, estimate_states
from launch.memory.parameters import count_parameters
from launch.precision import BYTES, Precision
from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT, Block
from model.head import Head
from model.kernels import linear_cross_entropy, select_kernel
from model.recompute import Recompute
from model.rope import rotary_tables
from parallel.mesh import MeshShape
from parallel.tensor import apply_tensor_parallel
from parallel.zero_config import LIVE_PARAMETERS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_RECOMPUTING: tuple[Recompute, ...] = ("selective", "attention", "full")


# 1000 elements over 4 ranks: 250 each.
@pytest.mark.parametrize(
    ("stage", "precision", "parameters", "gradients", "masters", "moments"),
    [
        (0, "fp32", 4000, 4000, 0, 8000),
        (0, "bf16", 4000, 4000, 0, 8000),
        (1, "fp32", 4000, 4000, 1000, 2000),
        (1, "bf16", 2000, 6000, 1000, 2000),
        (1, "fp16", 2000, 4000, 1000, 2000),
        (2, "fp32", 4000, 1000, 1000, 2000),
        (2, "bf16", 2000, 1000, 1000, 2000),
        (3, "fp32", 1000, 1000, 1000, 2000),
        (3, "bf16", 500, 1000, 1000, 2000),
    ],
)
def test_states_by_stage(
    stage: int, precision: str, parameters: int, gradients: int, masters: int, moments: int
) -> None:
    states = estimate_states(1000, stage, precision, 4)  # type: ignore[arg-type]
    found = (states.parameters, states.gradients, states.master_weights, states.moments)
    assert found == (parameters, gradients, masters, moments)
    assert states.total == sum(found)


@pytest.mark.parametrize(
    ("stage", "offload_parameters", "on_device"), [(1, False, 2000), (2, False, 2000), (3, False, 500), (3, True, 0)]
)
def test_what_an_offloaded_optimizer_leaves_on_the_device(stage: int, offload_parameters: bool, on_device: int) -> None:
    """Of 1000 bf16 parameters on 4 ranks: the parameters, unless they go too."""
    states = estimate_states(1000, stage, "bf16", 4, offload_optimizer=True, offload_parameters=offload_parameters)
    assert states.on_device == on_device and states.host == states.total - on_device
    assert states.total - states.parameters == 250 * (20 if stage == 3 else 22)


def test_a_second_share_of_parameters_is_of_fewer_ranks() -> None:
    assert estimate_states(1001, 3, "bf16", 4, secondary_partition_size=2).parameters == 2 * (251 + 501)


@pytest.mark.parametrize(
    ("parameters", "stage", "precision", "copies"),
    [
        (1000, 3, "bf16", 2000),
        (1000, 3, "fp32", 4000),
        (10**10, 3, "bf16", 2 * LIVE_PARAMETERS),
        (1000, 0, "bf16", 2000),
        (1000, 0, "fp32", 0),
        (1000, 1, "bf16", 0),
    ],
)
def test_copies_to_compute_with(parameters: int, stage: int, precision: Precision, copies: int) -> None:
    assert formulas.working_copies(parameters, stage, precision) == copies


def test_a_footprint_adds_up() -> None:
    """Of bf16 on one rank: fp32 states and bf16 copies at stage 0; residual streams are fp32 there."""
    found = {}
    for stage in (0, 1):
        overrides = ["training.precision=bf16", f"parallel.zero_stage={stage}", "parallel.tensor_parallel_size=1"]
        job = load_job(CONFIGS / "quickstart.yaml", [*overrides, "parallel.context_parallel_size=1"], 1)
        found[stage] = footprint(job, MeshShape(1, 1, 1), "cuda", ["none"] * job.model.num_hidden_layers)
    number, tokens = count_parameters(job.model), job.training.micro_batch_size * job.training.sequence_length
    assert found[0].peak == (16 + 2) * number + found[0].activations.peak
    assert found[1].peak == (2 + 6 + 12) * number + found[1].activations.peak
    streams = 2 * tokens * job.model.hidden_size * (2 * job.model.num_hidden_layers + 1)
    assert found[0].activations.kept - found[1].activations.kept == streams


def amount(formula: str, **letters: float) -> float:
    """Bytes by a formula as a check prints it: what stands side by side is multiplied."""
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), {"max": max}, letters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "tile"), [(96, None), (96, 32), (16, None)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("qk_norm", "compiled"), [(False, False), (True, True)])
def test_a_rank_of_two_holds_what_the_printed_formulas_say(
    qk_norm: bool, compiled: bool, sequence_parallel: bool, tokens: int, tile: int | None, precision: Precision
) -> None:
    """With 16 tokens the weight's gradients outweigh a chunk of logits."""
    config = shape(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=24, qk_norm=qk_norm)
    letters = {
        "t": tokens,
        "c": tokens,
        "b": BYTES[precision],
        "E": 64,
        "D": 24,
        "tp": 2,
        "F": 40,
        "H": 4,
        "K": 2,
        "V": 66,
    }

    def estimate(
        recompute: Recompute | list[Recompute],
        context: ContextPlan | list[ContextPlan | None] | None = None,
        autocast: bool = False,
        offload: bool = False,
    ) -> Activations:
        return estimate_activations(
            config,
            tokens=tokens,
            tensor_parallel_size=2,
            sequence_parallel=sequence_parallel,
            context=context if isinstance(context, list) else [context] * 3,
            precision=precision,
            autocast=autocast,
            recompute=recompute if isinstance(recompute, list) else [recompute] * 3,
            compiled=compiled,
            mlp_tile_tokens=tile,
            offload=offload,
        )

    block = amount(formulas.block_formula(qk_norm, sequence_parallel, tile is not None, compiled), **letters)
    state = amount("t E b", **letters) / (2 if sequence_parallel else 1)
    found = estimate("none")
    assert found.kept == 3 * block + state and found.recomputed == found.context == 0
    wide = estimate("none", autocast=True)  # the residual stream and the head's weight in fp32
    assert wide.kept - found.kept == 7 * (amount("t 4 E", **letters) / (2 if sequence_parallel else 1) - state)
    assert wide.head == amount(formulas.HEAD_FORMULA, **letters | {"b": 4})
    assert found.head == amount(formulas.HEAD_FORMULA, **letters)
    assert found.tile == (amount("4 F b", **letters) * tile if tile else 0)
    if not sequence_parallel:
        for policy in _RECOMPUTING:
            found, formula = estimate(policy), formulas.kept_formula(policy, compiled, True)
            assert found.kept == 3 * amount(formula, **letters) + state and found.recomputed == block
    ring = ContextPlan(1, 3, "ring", 0, 0, 0, 1, 0.0)
    exchange = ContextPlan(1, 3, "exchange", 250, 0, 0, 1, 0.0)
    heads = ContextPlan(2, 1, "exchange", 0, 0, 0, 1, 0.0)
    both = ContextPlan(2, 3, "exchange", 500, 0, 0, 1, 0.0)
    by_heads = amount(formulas.HEADS_FORMULA, f=1, **letters)
    inside = letters | {"t": 2 * tokens, "H": 2, "K": 1}  # each of two ranks has half of the heads of both's tokens
    assert estimate("full", ring).context == amount(formulas.RING_FORMULA, **letters)
    assert estimate("full", exchange).context == amount(formulas.EXCHANGE_FORMULA, M=250, **letters)
    assert estimate("full", heads).context == by_heads
    assert estimate("full", both).context == by_heads + amount(formulas.EXCHANGE_FORMULA, M=500, **inside)
    assert estimate("full", replace(both, keys="ring")).context == by_heads + amount(formulas.RING_FORMULA, **inside)
    assert estimate("full", replace(exchange, by_keys=2)).context == amount(formulas.EXCHANGE_FORMULA, M=250, **letters)
    assert estimate("full", [heads, both, None]).context == estimate("full", both).context
    # What was received is kept: of two ranks' keys those that were fetched, of traded heads all.
    kept = estimate("none").kept
    assert estimate("none", replace(exchange, by_keys=2, keep_gathered=True)).kept - kept == 3 * amount(
        "2 (250 - t) K D b", **letters
    )
    traded = amount("2 t (H + K) D b", **letters)
    assert estimate("none", heads).kept - kept == 3 * traded
    assert estimate("full", heads).recomputed == block + traded and estimate("attention", heads).recomputed == block
    # In host memory, but for the two largest blocks.
    offloaded = estimate(["none", "none", "full"], offload=True)
    assert (offloaded.kept, offloaded.host, offloaded.freed) == (2 * block + state, 2 * block + state, 0)


def test_the_largest_group_of_heads_decides_what_four_slots_hold() -> None:
    plan = ContextPlan(2, 1, "exchange", 0, 0, 0, 3, 0.0)  # four of eight KV heads in groups of 2, 1, 1
    expected = amount(formulas.HEADS_FORMULA, t=96, f=0.5, H=16, K=8, D=24, b=2)
    assert formulas.context_bytes(plan, 96, 16, 8, 24, 2) == expected


def shape(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ModelConfig.model_validate(values | changes)


def on_one_rank(
    config: ModelConfig,
    tokens: int = 256,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    mlp_tile_tokens: int | None = None,
    compiled: bool = False,
) -> Activations:
    return estimate_activations(
        config,
        tokens=tokens,
        tensor_parallel_size=1,
        sequence_parallel=False,
        context=[None] * config.num_hidden_layers,
        precision=precision,
        autocast=False,
        recompute=[recompute] * config.num_hidden_layers,
        compiled=compiled,
        mlp_tile_tokens=mlp_tile_tokens,
    )


def build(config: ModelConfig, device: str, recompute: Recompute = "none", tile: int | None = None) -> GPT:
    kernel, _ = select_kernel(
        "cpu", device_type="cpu", dtype=torch.float32, head_dim=config.head_dim, window=False, documents=False
    )
    with torch.device(device):
        return GPT(config, kernel_attention(kernel, config), recompute=recompute, mlp_tile_tokens=tile)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"qk_norm": True},
        {"attention_bias": "qkv"},
        {"attention_bias": "all"},
        {"num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=["plain", "tied", "qk_norm", "bias", "output bias", "mqa"],
)
def test_parameters_are_those_of_the_model(changes: dict[str, object]) -> None:
    config = shape(**changes)
    model = build(config, "meta")
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_a_tensor_parallel_rank() -> None:
    # embedding and head: 66 x 48 each (131 padded to 132); block: q and o 2 x 24 x 48, k and v 2 x 12 x 48,
    # feed-forward 3 x 40 x 48, two norms of 48; last norm 48
    assert count_parameters(shape(), 2) == 2 * 66 * 48 + 3 * (72 * 48 + 120 * 48 + 96) + 48
    # biases of 24, 12 and 12 split heads, and a whole one of the output
    assert count_parameters(shape(attention_bias="all"), 2) - count_parameters(shape(), 2) == 3 * (48 + 48)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("qk_norm", "tile"), [(False, None), (True, None), (False, 32), (False, 256)])
def test_activations_are_those_of_the_model(qk_norm: bool, tile: int | None, recompute: Recompute) -> None:
    """Bytes that autograd keeps in a real forward pass, the head's gradients apart, against the formula."""
    torch.manual_seed(0)
    config = shape(hidden_size=64, intermediate_size=160, num_hidden_layers=6, qk_norm=qk_norm)
    model = build(config, "cpu", recompute, tile)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    input_ids = torch.randint(0, config.vocab_size, (2, 128))
    positions = torch.arange(128).expand(2, -1)
    kept, loss = bytes_kept(lambda: model(input_ids, positions, labels=input_ids)[0], model.parameters())
    head_gradients = 4 * (256 + config.vocab_size) * config.hidden_size
    estimate = on_one_rank(config, recompute=recompute, mlp_tile_tokens=tile)
    # torch has no fused RMSNorm on CPUs: there each norm keeps its normalised input too.
    normalised = 64 * (1 if recompute == "full" else 1 + 2 * config.num_hidden_layers)
    if qk_norm and recompute == "none":
        normalised += config.num_hidden_layers * 6 * config.head_dim
    expected = estimate.kept + 4 * 256 * normalised
    assert loss.requires_grad
    assert kept - head_gradients == pytest.approx(expected, rel=0.03)


def bytes_kept(forward: Callable[[], torch.Tensor], besides: Iterable[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes of numbers that autograd keeps of a forward pass, `besides` apart; and its result."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    return sum(kept.values()), result


@pytest.mark.parametrize("recompute", ["none", *_RECOMPUTING])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_compiled_block_keeps_what_is_estimated(qk_norm: bool, recompute: Recompute) -> None:
    """The bytes that the compiler's partitioner, the same for all devices, lets a block of bf16 numbers keep."""
    torch._dynamo.reset()
    config = shape(hidden_size=64, intermediate_size=160, num_hidden_layers=1, qk_norm=qk_norm)
    model = build(config, "cpu", recompute).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    (layer,) = model.layers
    layer.run = torch.compile(Block.under_policy, fullgraph=True, backend="aot_eager_decomp_partition")
    hidden = torch.randn(2, 128, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = rotary_tables(torch.arange(128).expand(2, -1), config, torch.bfloat16)
    kept, _ = bytes_kept(lambda: layer(hidden, rotary, None), [*model.parameters(), *rotary])
    statistics = 4 * 256 * (2 + (6 if qk_norm else 0)) if recompute == "none" else 0  # one number for each norm
    estimate = on_one_rank(config, precision="bf16", recompute=recompute, compiled=True)
    assert kept == estimate.kept - hidden.nbytes + statistics  # the last norm's input is not the block's


@pytest.mark.parametrize("recompute", ["none", *_RECOMPUTING])
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(2, False), (4, True)])
def test_a_compiled_block_of_a_tensor_parallel_rank_keeps_what_is_estimated(
    ranks: int, sequence_parallel: bool, recompute: Recompute
) -> None:
    torch._dynamo.reset()
    config = shape(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4
    )
    with alone(ranks):
        model = build(config, "meta", recompute)
        group = dist.distributed_c10d._get_default_group()
        apply_tensor_parallel(model, model.tensor_parallel_plan, group, sequence_parallel=sequence_parallel)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        (layer,) = model.layers
        layer.run = torch.compile(Block.under_policy, fullgraph=True, backend="aot_eager_decomp_partition")
        tokens = 256 // ranks if sequence_parallel else 256  # between regions
        hidden = torch.randn(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        rotary = rotary_tables(torch.arange(256)[None], config, torch.bfloat16)
        kept, _ = bytes_kept(lambda: layer(hidden, rotary, None), [*model.parameters(), *rotary])
    statistics = 4 * 2 * tokens if recompute == "none" else 0  # one number for each norm
    estimate = estimate_activations(
        config,
        tokens=256,
        tensor_parallel_size=ranks,
        sequence_parallel=sequence_parallel,
        context=[None],
        precision="bf16",
        autocast=False,
        recompute=[recompute],
        compiled=True,
    )
    assert kept == estimate.kept - hidden.nbytes + statistics  # the last norm's input is not the block's


class Results(TorchDispatchMode):
    """Bytes that matrix products and attention give."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            self.products += result.nbytes
        elif function is torch.ops.ringzero.attention.default:
            self.attention += sum(tensor.nbytes for tensor in result)
        return result


def test_what_policies_keep_is_what_blocks_compute() -> None:
    """A policy names operators: the formula against the sizes of what these give in a real forward pass."""
    config = shape(hidden_size=64, intermediate_size=160, num_hidden_layers=6)
    model = build(config, "cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    hidden, positions = torch.randn(2, 128, 64), torch.arange(128).expand(2, -1)
    rotary = rotary_tables(positions, config, torch.float32)
    with Results() as found:
        for layer in model.layers:
            hidden = layer(hidden, rotary, None)
    inputs = 7 * hidden.nbytes  # of six blocks, and of the last norm
    for policy, kept in (("attention", found.attention), ("selective", found.attention + found.products)):
        assert on_one_rank(config, recompute=policy).kept == inputs + kept


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operations made and that were alive together, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {address: entry for address, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize(("hidden_size", "tokens"), [(32, 2048), (256, 2048), (32, 100)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_head_takes_what_is_estimated(
    precision: Precision, hidden_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 256 tokens; in the second case the weight's gradients outweigh a chunk."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_LOGITS", 256 * 4096)
    config = shape(vocab_size=4096, hidden_size=hidden_size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    head = Head(hidden_size, 4096).to(dtype)
    torch.nn.init.normal_(head.weight, std=0.02)
    hidden = torch.randn(1, tokens, hidden_size, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 4096, (1, tokens))
    with Peak() as peak:
        head(hidden, labels)[0].backward()
    estimate = on_one_rank(config, tokens, precision)
    # torch's CPU has no product of bf16 numbers with an fp32 result: for a moment there is a bf16 one.
    slack = 0 if precision == "fp32" else 2 * 4096 * hidden_size
    assert 0.95 * estimate.head <= peak.bytes <= 1.02 * estimate.head + slack, (estimate.head, peak.bytes)
