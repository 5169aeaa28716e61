"""Memory of one rank by formula: states by ZeRO stage, and activations.

Letters: E hidden_size, D head_dim; one tensor-parallel rank's share of F intermediate_size, H query heads, K key/value
heads and V padded vocabulary; t tokens of one micro-batch on one rank; b bytes of a working number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.context_plan import ContextPlan
from launch.precision import BYTES, Precision
from model.config import ModelConfig
from model.kernels.linear_cross_entropy import chunk_tokens
from model.recompute import Recompute
from parallel.ulysses import group_sizes
from parallel.vocab import padded_vocabulary
from parallel.zero_config import LIVE_PARAMETERS


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds from the first backward pass to the optimizer step."""

    parameters: int
    gradients: int
    master_weights: int
    moments: int
    host: int = 0
    """How many of these bytes are in host memory."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.master_weights + self.moments

    @property
    def on_device(self) -> int:
        return self.total - self.host


def estimate_states(
    parameters: int,
    zero_stage: int,
    precision: Precision,
    zero_size: int,
    *,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    secondary_partition_size: int = 1,
) -> States:
    """The states of `parameters` elements that `zero_size` = dp x cp ranks hold, as DeepSpeed 0.19 keeps them.

    Exact but for the padding to whole partitions. Moments and master weights are fp32, gradients accumulate in fp32.

    - Stage 0: fp32 parameters are their own masters (bf16 runs under autocast); nothing is shared out.
    - Stages 1 to 3: fp32 masters are kept beside the parameters, fp32 ones too, and shared out with the moments.
    - Stage 1, bf16: the backward pass writes bf16 gradients, which are added to whole fp32 ones: 6 bytes.
    - Stage 2 shares gradients out, stage 3 parameters too.
    - A secondary partition is a second share of the parameters, of that many ranks.
    - An offloaded optimizer keeps in host memory masters, moments, two copies of the share of fp32 gradients (one
      accumulates, one is what the update reads) and, below stage 3, the updated share in the parameters' type.
    """
    share, width = -(-parameters // zero_size), BYTES[precision]
    secondary = width * -(-parameters // secondary_partition_size) if secondary_partition_size > 1 else 0
    if zero_stage == 0:
        return States(4 * parameters, 4 * parameters, 0, 8 * parameters)
    if offload_optimizer:
        updated = width * share if zero_stage < 3 else 0
        return States(
            parameters=width * (share if zero_stage == 3 else parameters) + secondary,
            gradients=8 * share,
            master_weights=4 * share + updated,
            moments=8 * share,
            host=20 * share + updated + (width * share if offload_parameters else 0),
        )
    gradient_bytes = 6 if zero_stage == 1 and precision == "bf16" else 4
    return States(
        parameters=width * (share if zero_stage == 3 else parameters) + secondary,
        gradients=gradient_bytes * (share if zero_stage >= 2 else parameters),
        master_weights=4 * share,
        moments=8 * share,
    )


def working_copies(parameters: int, zero_stage: int, precision: Precision) -> int:
    """Bytes of parameters that computing takes beside the states: what stage 3 has gathered at a time, at most, and
    stage 0's bf16 copies of its fp32 parameters."""
    if zero_stage == 3:
        return BYTES[precision] * min(parameters, LIVE_PARAMETERS)
    return 2 * parameters if zero_stage == 0 and precision == "bf16" else 0


def host_copies(parameters: int, zero_stage: int, zero_size: int) -> int:
    """Bytes of host memory that a rank keeps from its first asynchronous save on: fp32 weights and both moments of what
    it saves. At stage 0 that is all of them on one of the `zero_size` ranks, and nothing on the others."""
    return 12 * (parameters if zero_stage == 0 else -(-parameters // zero_size))


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, at the end of its forward pass."""

    kept: int
    """What all blocks keep for the backward pass on the device."""
    recomputed: int
    """What one block holds while it is computed again (activation_checkpointing)."""
    head: int
    """A chunk of logits and what is made of it, then the gradients of the weight and of the hidden states."""
    context: int
    """Context parallelism: what one block's attention holds beside its inputs and outputs."""
    tile: int
    """What one tile of a feed-forward layer holds while it is computed again (mlp_tile_tokens)."""
    freed: int = 0
    """The part of `kept` that the last blocks have freed when the first block is computed again."""
    host: int = 0
    """What blocks keep in host memory (offload_activations)."""

    @property
    def peak(self) -> int:
        """The head's tensors are gone when the first block is computed again."""
        work = max(self.context, self.tile)
        return self.kept + max(self.head, work, self.recomputed + work - self.freed)


def block_formula(qk_norm: bool, sequence_parallel: bool, tiled: bool, compiled: bool) -> str:
    """Block input and its norm's output, and the same before the feed-forward layer; q, k, v and the attention output
    (QK-norm keeps its inputs too); gate, up, their product and, unless it is compiled, gate's silu; fp32 log-sum-exp.
    Under sequence parallelism a rank has a part of the inputs, and gathers the norms' outputs; a tiled feed-forward
    layer keeps nothing inside."""
    inputs = "(2 + 2 / tp) E b" if sequence_parallel else "4 E b"
    heads = "3 (H + K)" if qk_norm else "2 (H + K)"
    inside = "" if tiled else f"{_inside(compiled)} F b + "
    return f"t ({inputs} + {heads} D b + {inside}4 H)"


def kept_formula(policy: Recompute, compiled: bool, tensor_parallel: bool) -> str:
    """What a block keeps that computes again by `policy`: its input; attention's output and log-sum-exp; q, k, v, gate,
    up, and the outputs of both sublayers, whole partial sums under tensor parallelism; without it a compiled block
    leaves out the last. Under sequence parallelism a rank has a part of the input."""
    formulas: dict[Recompute, str] = {
        "selective": f"t ((2 H + 2 K) D b + ({1 + _outputs(compiled, tensor_parallel)} E + 2 F) b + 4 H)",
        "attention": "t (E b + H D b + 4 H)",
        "full": "t E b",
    }
    return formulas[policy]


def _inside(compiled: bool) -> int:
    """Tensors of t F numbers that a feed-forward layer keeps. A compiler computes silu again as it reads its input."""
    return 3 if compiled else 4


def _outputs(compiled: bool, tensor_parallel: bool) -> int:
    """Sublayers whose outputs a selective checkpoint keeps. No gradient needs the second: a compiler sees that, but not
    where the ranks add it up, as torch's partitioner keeps what a collective would be computed again from."""
    return 1 if compiled and not tensor_parallel else 2


HEAD_FORMULA = "4 E V + t E b + max(8 c V, E V b + t E b)"
"""Head: the gradients of the weight, in fp32, and of the hidden states; with them 8 bytes for each logit of a chunk of
c tokens, later both gradients once more, as the backward pass hands them on."""
RING_FORMULA = "t D (4 H + 16 K + 4 K b)"
"""Ring: dQ or the merged output, and dK and dV held and received, in fp32; keys and values held and received."""
EXCHANGE_FORMULA = "(12 M + 6 t) K D b"
"""Exchange: the buffer of keys and values, and its gradient; a peer's shares, the sums in fp32; four slots that peers
read."""
HEADS_FORMULA = "t (4 f (H + 2 K) + H) D b"
"""Heads: four slots that peers read, of the largest group of heads (a share f of all); the output's gradient for all
tokens."""


def estimate_activations(
    model: ModelConfig,
    *,
    tokens: int,
    tensor_parallel_size: int,
    sequence_parallel: bool,
    context: Sequence[ContextPlan | None],
    precision: Precision,
    autocast: bool,
    recompute: Sequence[Recompute],
    compiled: bool,
    mlp_tile_tokens: int | None = None,
    offload: bool = False,
) -> Activations:
    """Activations of `tokens` tokens (one micro-batch on one rank).

    `autocast`: bf16 over fp32 parameters (stage 0), where the residual stream and the norms' inputs are fp32.
    `context` and `recompute`: a plan and a policy for each block. `compiled`: the blocks are, so that whatever the
    policy some of what is cheap is computed again. `offload`: blocks keep in host memory what is as large as their
    input; on the device are those of two blocks, of which one is on its way.
    """
    b, size = BYTES[precision], tensor_parallel_size
    t, E, D, F = tokens, model.hidden_size, model.head_dim, model.intermediate_size // size
    H, K = model.num_attention_heads // size, model.num_key_value_heads // size
    V = padded_vocabulary(model.vocab_size, size) // size
    stream = 4 if autocast else b  # bytes of a number of the residual stream, and of the head's weight
    tile = 0 if mlp_tile_tokens is None or mlp_tile_tokens >= t else mlp_tile_tokens
    residual = t * E * stream // (size if sequence_parallel else 1)
    statistics = 4 * t * H
    attended = t * H * D * b + statistics
    heads = (3 if model.qk_norm else 2) * (H + K)
    block = 2 * residual + t * (2 * E + heads * D + (0 if tile else _inside(compiled) * F)) * b + statistics
    kept: dict[Recompute, int] = {
        "none": block,
        "selective": residual + attended + t * ((H + 2 * K) * D + _outputs(compiled, size > 1) * E + 2 * F) * b,
        "attention": residual + attended,
        "full": residual,
    }
    in_blocks, again = [], []
    for policy, plan in zip(recompute, context, strict=True):
        exchanged = context_kept(plan, t, H, K, D, b)
        in_blocks.append(kept[policy] + (exchanged if policy != "full" else 0))
        again.append(0 if policy == "none" else block + (exchanged if policy == "full" else 0))
    stays = [statistics if policy == "attention" else 0 for policy in recompute] if offload else in_blocks
    leaves = [whole - part for whole, part in zip(in_blocks, stays, strict=True)]
    last = max((number for number, policy in enumerate(recompute) if policy != "none"), default=len(recompute) - 1)
    return Activations(
        kept=sum(stays) + sum(sorted(leaves)[-2:]) + residual,  # with the last norm's input
        recomputed=max(again),
        head=_head(t, E, V, stream),
        context=max(context_bytes(plan, t, H, K, D, b) for plan in context),
        tile=tile * 4 * F * b,
        freed=0 if offload else sum(in_blocks[last + 1 :]),
        host=sum(leaves),
    )


def context_kept(context: ContextPlan | None, t: int, H: int, K: int, D: int, b: int) -> int:
    """What one block's attention keeps for its backward pass beside its inputs and outputs."""
    if context is None:
        return 0
    if context.by_heads > 1:  # queries, outputs, keys and values of all tokens, for a share of the heads
        return 2 * t * (H + K) * D * b
    return 2 * (context.fetched_tokens - t) * K * D * b if context.keep_gathered else 0


def context_bytes(context: ContextPlan | None, t: int, H: int, K: int, D: int, b: int) -> int:
    """What one block's attention holds beside its inputs and outputs while it works: RING_, EXCHANGE_ and
    HEADS_FORMULA."""
    if context is None:
        return 0
    size, ranks = 0, context.by_heads
    inside, heads = t * ranks, K // ranks  # of the ranks that trade keys
    if context.by_keys > 1 and context.keys == "ring":
        size += inside * D * (4 * (H // ranks) + 16 * heads + 4 * heads * b)
    elif context.by_keys > 1:
        size += (12 * context.fetched_tokens + 6 * inside) * heads * D * b
    if ranks > 1:
        f = max(group_sizes(heads, context.head_groups)) / heads
        size += int(t * (4 * f * (H + 2 * K) + H) * D * b)
    return size


def _head(t: int, E: int, V: int, b: int) -> int:
    """HEAD_FORMULA."""
    c = min(t, chunk_tokens(V))
    return 4 * E * V + t * E * b + max(8 * c * V, E * V * b + t * E * b)
