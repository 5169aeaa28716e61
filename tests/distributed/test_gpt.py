"""The GPT cut over tensor and context parallelism against itself on one rank: loss and every gradient in fp64.

No ZeRO here: gradients are added up over the context-parallel group as they leave autograd.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from model.attention import attention_of_blocks, kernel_attention
from model.config import ModelConfig, RopeScaling
from model.gpt import GPT
from model.kernels import KERNELS, Documents
from parallel.collectives import all_reduced
from parallel.materialize import materialize
from parallel.mesh import MeshShape, ParallelMesh
from parallel.ring import RingAttention
from parallel.sequence import shard_sequence
from parallel.tensor import TensorShard, apply_tensor_parallel, sum_partial_gradients
from tests.distributed.harness import run_distributed

B, S, V = 2, 32, 61
MESHES = [
    (2, 1, True),
    (2, 1, False),
    (4, 1, True),
    (4, 1, False),
    (1, 2, False),
    (1, 4, False),
    (2, 2, True),
    (2, 2, False),
]
"""tp, cp, sequence parallel; what is left of four ranks repeats the others' work."""


@dataclass(frozen=True)
class Variant:
    changes: dict[str, Any]
    lengths: tuple[int, ...] = (S,) * B
    checkpointing: bool = False
    labelled: tuple[int, int] = (0, S)
    """First and last + 1 of the positions with labels, in every row; the others have -100."""

    def config(self) -> ModelConfig:
        values = {
            "vocab_size": V,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "initializer_range": 0.3,
        }
        return ModelConfig(**(values | self.changes))


VARIANTS = {
    "plain": Variant({}),
    "qk_norm, tied, MHA": Variant({"qk_norm": True, "tie_word_embeddings": True, "num_key_value_heads": 8}),
    "biases": Variant({"attention_bias": "all"}),
    "documents, window, recomputed": Variant(
        {
            "qk_norm": True,
            "sliding_window": 5,
            "rope_theta": 90.0,
            "rope_scaling": RopeScaling(factor=4.0, original_sequence_length=16),
        },
        (1, 20, 11, 7, 1, 1, 23),
        checkpointing=True,
    ),
    "a window in one block": Variant({"sliding_window": 5, "full_attention_layers": (1,)}, (9, 23, 32)),
    # A quarter in, for an eighth: these tokens are one rank's, whether two or four share a sequence.
    "labels on one rank only": Variant({}, labelled=(S // 4, 3 * S // 8)),
}


def inputs(variant: Variant) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, position_ids and labels [B, S]; the last rows' labels are mostly ignored."""
    tokens = np.random.default_rng(5).integers(0, V, (B, S + 1))
    labels = tokens[:, 1:].copy()
    first, last = variant.labelled
    if last - first == S:
        labels[1, :25] = -100
    labels[:, :first] = labels[:, last:] = -100
    positions = np.concatenate([np.arange(length) for length in variant.lengths]).reshape(B, S)
    return tokens[:, :-1], positions, labels


def documents(variant: Variant) -> Documents | None:
    return Documents.from_boundaries([0, *accumulate(variant.lengths)], "cpu") if len(variant.lengths) > B else None


def fill(model: GPT, shards: dict[str, TensorShard]) -> None:
    materialize(
        model,
        shards,
        # Norms away from 1, so that a missing one is missed.
        lambda name: (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.3),
        seed=1,
        device=torch.device("cpu"),
        dtype=torch.float64,
        partition=lambda module: None,
    )


def dense_twin(variant: Variant) -> tuple[GPT, float]:
    """The model with its gradients, and its loss."""
    config = variant.config()
    with torch.device("meta"):
        model = GPT(config, kernel_attention(KERNELS["math"], config))
    fill(model, {name: TensorShard(tuple(parameter.shape)) for name, parameter in model.named_parameters()})
    loss, _ = model(*(torch.from_numpy(array) for array in inputs(variant)), documents(variant))
    loss.backward()
    return model, loss.item()


def _compare() -> dict[str, float]:
    """The largest relative error of each mesh and variant; gradients by their norm."""
    found = {}
    twins = {name: dense_twin(variant) for name, variant in VARIANTS.items()}
    for tp_size, cp_size, sequence_parallel in MESHES:
        mesh = ParallelMesh.create(MeshShape.fit(4, tp_size, cp_size))
        for variant_name, variant in VARIANTS.items():
            config = variant.config()
            attention = kernel_attention(KERNELS["math"], config)
            if cp_size > 1:
                ring = partial(RingAttention, mesh.cp_group, KERNELS["math"], scale=config.head_dim**-0.5)
                attention = attention_of_blocks(config, lambda window, ring=ring: ring(window=window))  # type: ignore[misc]
            with torch.device("meta"):
                model = GPT(config, attention, recompute="full" if variant.checkpointing else "none")
            shards = apply_tensor_parallel(
                model, model.tensor_parallel_plan, mesh.tp_group, sequence_parallel=sequence_parallel
            )
            fill(model, shards)
            sum_partial_gradients(model, shards, mesh.tp_group)
            local = (torch.from_numpy(shard_sequence(a, cp_size, mesh.cp_rank)) for a in inputs(variant))
            loss, _ = model(*local, documents(variant))
            loss.backward()

            dense, dense_loss = twins[variant_name]
            errors = [abs(all_reduced(loss.detach(), mesh.cp_group).item() / dense_loss - 1)]
            whole = dict(dense.named_parameters())
            for name, parameter in model.named_parameters():
                shard, full, local_grad = shards[name], whole[name].grad, parameter.grad
                assert full is not None and local_grad is not None
                expected = full[tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))]
                gradient = all_reduced(local_grad, mesh.cp_group)[tuple(slice(n) for n in shard.sizes)]
                errors.append(((gradient - expected).norm() / full.norm()).item())
            split = ", sequence parallel" if sequence_parallel else ""
            found[f"{tp_size} x {cp_size}{split}, {variant_name}"] = max(errors)
    return found


def test_every_cut_of_the_model_gives_its_gradients() -> None:
    for errors in run_distributed(_compare, 4):
        assert len(errors) == len(MESHES) * len(VARIANTS)
        for name, error in errors.items():
            assert error < 1e-12, name
