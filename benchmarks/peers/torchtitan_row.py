"""torchtitan 0.2.2 on a row's job: its own trainer, model, FSDP2, compilation and context parallelism.

What is not its own: the tokens and the first weights, which all systems share, and that losses are kept instead of
logged. Its words for ours: ZeRO-3 is resharding after the forward pass, ZeRO-2 is not doing so; recomputation
`selective` is its operator policy (attention and every second matrix product are kept).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.config import job_config as section
from torchtitan.models import llama3
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.train import Trainer

from launch.config import JobConfig
from workload import FirstWeights, random_batches, record, timed_steps

_NAME = "same_work"
_OUR_NAMES = {
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "ffn_norm": "feed_forward_norm",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "_orig_mod": "",
    "_checkpoint_wrapped_module": "",
}


class SharedTokens(BaseDataLoader):
    """The micro-batches of all steps, made beforehand."""

    def __init__(self, job: JobConfig, steps: int, *, dp_world_size: int, dp_rank: int, **_others: Any) -> None:
        batches = random_batches(job, dp_world_size, dp_rank)
        self._made = [batch for step in range(steps) for batch in batches.micro_batches(step)]

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for batch in self._made:
            yield {"input": torch.from_numpy(batch.input_ids)}, torch.from_numpy(batch.labels)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("a benchmark's tokens are not resumed")


class KeptMetrics(MetricsProcessor):
    """Keeps the last step's loss and gradient norm."""

    last = (math.nan, math.nan)

    def log(
        self, step: int, global_avg_loss: float, global_max_loss: float, grad_norm: float, *_: Any, **__: Any
    ) -> None:
        self.last = (global_avg_loss, grad_norm)


def measure(job: JobConfig, steps: int) -> dict[str, Any]:
    """One row, on every rank of its world."""
    with tempfile.TemporaryDirectory() as scratch:
        register(job, steps)
        trainer = Trainer(titan_config(job, steps, scratch))
        fill_with_our_weights(trainer.model_parts[0], job)
        batches = trainer.batch_generator(trainer.dataloader)

        def train_step(step: int) -> tuple[float, float]:
            trainer.step = step + 1
            trainer.gc_handler.run(trainer.step)
            trainer.train_step(batches)
            return trainer.metrics_processor.last

        measured = timed_steps(train_step, steps)
        found = record(job, measured)
        trainer.close()
    return found


def register(job: JobConfig, steps: int) -> None:
    """Makes the row's network and tokens known to torchtitan."""
    shape = job.model
    assert 8 * shape.hidden_size // 3 <= shape.intermediate_size, "their rounding cannot express this shape"
    arguments = TransformerModelArgs(
        dim=shape.hidden_size,
        n_layers=shape.num_hidden_layers,
        n_heads=shape.num_attention_heads,
        n_kv_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        multiple_of=shape.intermediate_size,
        norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
    )
    spec = replace(
        llama3.get_train_spec(),
        model_args={_NAME: arguments},
        build_tokenizer_fn=None,
        build_dataloader_fn=partial(SharedTokens, job, steps),
        build_metrics_processor_fn=lambda config, dims, _model, tag=None: KeptMetrics(config, dims, tag),
        state_dict_adapter=None,
    )
    register_train_spec(_NAME, spec)


def titan_config(job: JobConfig, steps: int, scratch: str) -> TitanConfig:
    """The job in torchtitan's words; what is not named has its default."""
    training, optimizer = job.training, job.optimizer
    assert training.activation_checkpointing in ("none", "selective", "full"), training.activation_checkpointing
    return TitanConfig(
        job=section.Job(dump_folder=scratch),
        model=section.Model(name=_NAME, flavor=_NAME, hf_assets_path=scratch),
        metrics=section.Metrics(log_freq=1),
        optimizer=section.Optimizer(
            lr=optimizer.learning_rate,
            beta1=optimizer.betas[0],
            beta2=optimizer.betas[1],
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ),
        lr_scheduler=section.LRScheduler(warmup_steps=0, decay_ratio=0.0),
        training=section.Training(
            local_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            seq_len=training.sequence_length,
            max_norm=training.gradient_clipping,
            steps=steps,
            mixed_precision_param="bfloat16",
            mixed_precision_reduce="float32",
        ),
        parallelism=section.Parallelism(
            context_parallel_degree=job.parallel.context_parallel_size,
            fsdp_reshard_after_forward="always" if job.parallel.zero_stage == 3 else "never",
        ),
        activation_checkpoint=section.ActivationCheckpoint(
            mode=training.activation_checkpointing,
            selective_ac_option="op",
        ),
        compile=section.Compile(enable=training.compile is not False),
    )


@torch.no_grad()
def fill_with_our_weights(model: nn.Module, job: JobConfig) -> None:
    """Writes the weights that our model starts from into this rank's shards, rounded to bf16 as ours are."""
    weights = FirstWeights(job)
    for theirs, parameter in model.named_parameters():
        name = ".".join(filter(None, (_OUR_NAMES.get(part, part) for part in theirs.split("."))))
        assert isinstance(parameter, DTensor) and parameter.shape == weights.left[name], (theirs, name)
        local = parameter.to_local()
        _, (start, *_) = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        drawn = torch.empty_like(local, dtype=torch.bfloat16)
        weights.draw(name, drawn, start)
        rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
        local.copy_(_interleaved(drawn, job.model.head_dim) if rotary else drawn)
    assert not weights.left, f"weights that torchtitan lacks: {sorted(weights.left)}"


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, E]: RoPE pairs (d, d + head_dim / 2), which are ours, laid side by side, as theirs are."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
