"""What the parity suite trains: layouts, ZeRO stages and variants of the model, each as a job.

Clipping is active at every step, Adam's eps is 1e-4 (1e-8 would turn rounding noise into whole updates), QK-norm is on,
and 61 tokens do not divide by the tensor-parallel size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from launch.config import JobConfig

STEPS, ACCUMULATION, GLOBAL_BATCH, LENGTH, VOCABULARY = 5, 2, 8, 32, 61
LAYOUTS = [(1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (2, 2, 2), (1, 4, 1)]
"""tp x cp x dp."""


@dataclass(frozen=True)
class Case:
    """One layout, ZeRO stage and model variant."""

    tp: int
    cp: int
    dp: int
    stage: int
    tied: bool
    key_value_heads: int = 2
    precision: str = "fp32"
    backend: str = "math"
    head_dim: int = 16
    mode: str = "auto"
    sequence_parallel: str = "auto"
    recompute: bool = False
    """Whole blocks in the backward pass, and feed-forward layers in tiles."""
    parallel: str = ""
    """More keys of the parallel section."""
    windowed: bool = False
    """The first block has a window, the second has none."""
    compiled: bool = False
    """Blocks compiled, with selective recomputation inside."""
    offload: bool = False
    """What blocks keep, their input and without `recompute` attention's output, lies in host memory."""

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.tp, self.cp, self.dp

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp

    def __str__(self) -> str:
        heads = {1: "MQA", 2: "GQA"}[self.key_value_heads]
        mode = f" {self.mode}" if self.cp > 1 and self.mode != "auto" else ""
        whole = " whole tokens" if self.sequence_parallel == "false" else ""
        tied = "tied" if self.tied else "untied"
        more = " windowed" * self.windowed + f" {self.parallel}" * bool(self.parallel)
        again = " recomputed" * self.recompute + " compiled" * self.compiled + " offloaded" * self.offload
        return f"{self.tp}x{self.cp}x{self.dp} stage {self.stage} {heads} {tied}{mode}{whole}{again}{more}"

    @property
    def policy(self) -> str:
        """Of activation checkpointing."""
        if self.recompute or self.offload:
            return "full" if self.recompute else "attention"
        return "selective" if self.compiled else "none"

    def model_variant(self) -> Case:
        """The case without its layout: cases that share it share a twin."""
        return replace(
            self,
            tp=1,
            cp=1,
            dp=1,
            stage=0,
            mode="auto",
            sequence_parallel="auto",
            recompute=False,
            compiled=False,
            offload=False,
            parallel="",
        )

    def job(self) -> JobConfig:
        """The case as a job."""
        return JobConfig.from_yaml(
            f"""
            model:
              {{vocab_size: {VOCABULARY}, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2,
               num_attention_heads: 4, num_key_value_heads: {self.key_value_heads}, head_dim: {self.head_dim}, qk_norm:
               true, tie_word_embeddings: {str(self.tied).lower()}, attention_backend: {self.backend},
               sliding_window: {LENGTH // 5 if self.windowed else "null"},
               full_attention_layers: {[1] if self.windowed else []}}}
            parallel:
              {{tensor_parallel_size: {self.tp}, context_parallel_size: {self.cp}, zero_stage: {self.stage},
               context_parallel_mode: {self.mode}, sequence_parallel: {self.sequence_parallel}, {self.parallel}}}
            data: {{source: files, files: [unused], tokenizer: unused}}
            optimizer: {{learning_rate: 0.003, eps: 1.0e-4, schedule: constant}}
            training:
              {{sequence_length: {LENGTH}, global_batch_size: {GLOBAL_BATCH}, precision: {self.precision},
               micro_batch_size: {GLOBAL_BATCH // ACCUMULATION // self.dp}, max_steps: {STEPS},
               gradient_clipping: 0.5, mlp_tile_tokens: {9 if self.recompute else "null"},
               compile: {str(self.compiled).lower()}, activation_checkpointing: {self.policy},
               offload_activations: {"cpu" if self.offload else "none"}}}
            """
        )


def all_cases() -> list[Case]:
    """Every layout at every stage, embeddings tied and not; MQA too where one KV head is allowed; the ring, heads, and
    tensor parallelism without sequence parallelism, once each; recomputation in tiles; compiled blocks; offload, of
    activations too; a window in one block; no overlap."""
    grouped = [
        Case(*layout, stage, tied) for layout, stage, tied in itertools.product(LAYOUTS, range(4), (True, False))
    ]
    ring = [Case(*layout, 3, False, mode=mode) for layout in LAYOUTS if layout[1] > 1 for mode in ("ring", "heads")]
    whole = [Case(*layout, 2, False, sequence_parallel="false") for layout in LAYOUTS if layout[0] > 1]
    again = [Case(*layout, 3, False, recompute=True) for layout in [(1, 1, 2), (2, 2, 2)]]
    offloaded = [
        Case(2, 1, 2, stage, False, parallel="offload_optimizer: cpu" + ", offload_parameters: cpu" * (stage == 3))
        for stage in (2, 3)
    ]
    layouts = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 1)]
    offloaded += [Case(*layout, 3, layout[0] == 1, parallel="secondary_partition_size: 2") for layout in layouts]
    windows = [Case(1, 1, 2, 3, False, compiled=True, windowed=True), Case(1, 2, 2, 3, False, windowed=True)]
    windows += [
        Case(2, 2, 1, 2, True, mode="heads", windowed=True),
        Case(1, 4, 1, 3, False, mode="ring", windowed=True),
    ]
    in_turn = [Case(1, 1, 2, stage, False, parallel="overlap_communication: false") for stage in (2, 3)]
    compiled = [Case(1, 1, 2, 3, False, compiled=True), Case(1, 1, 2, 2, True, compiled=True)]
    compiled += [Case(2, 1, 1, 3, False, compiled=True), Case(2, 2, 1, 2, False, compiled=True)]
    parked = [
        Case(1, 1, 2, 3, False, compiled=True, offload=True),
        Case(1, 2, 2, 3, False, recompute=True, offload=True),
    ]
    parked += [Case(2, 2, 1, 2, False, offload=True), Case(1, 2, 2, 3, True, mode="heads", offload=True)]
    compiled += [Case(1, 1, 2, 0, False, compiled=True), Case(1, 2, 1, 3, False, compiled=True)]
    single = [Case(*layout, stage, False, 1) for layout in LAYOUTS if layout[0] == 1 for stage in range(4)]
    return grouped + ring + whole + again + compiled + parked + offloaded + windows + in_turn + single
