"""transformers' Llama under DeepSpeed ZeRO-3 on a row's job, as its documentation sets it up.

DeepSpeed's buffers are what transformers' Trainer makes of `auto`; gradients are reduced and accumulated in fp32, as by
all systems here. `activation_checkpointing: full` is its gradient checkpointing; attention is torch's sdpa, or
flash-attn 2 where `model.attention_backend` says so.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import JobConfig
from launch.weights.hugging_face import their_name
from parallel.zero import initialize_distributed
from workload import FirstWeights, random_batches, record, timed_steps

_ATTENTION = {"auto": "sdpa", "flash_attn_2": "flash_attention_2"}


def measure(job: JobConfig, steps: int, device: torch.device) -> dict[str, Any]:
    """One row, on every rank of its world."""
    initialize_distributed(device.type)
    assert job.parallel.tensor_parallel_size == job.parallel.context_parallel_size == 1
    assert job.training.activation_checkpointing in ("none", "full"), job.training.activation_checkpointing
    config = deepspeed_config(job, dist.get_world_size())
    model = build(job, config, device)
    if job.training.activation_checkpointing == "full":
        model.gradient_checkpointing_enable()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model, job, device), config=config)
    batches = random_batches(job, dist.get_world_size(), dist.get_rank())
    made = [
        [(torch.from_numpy(b.input_ids), torch.from_numpy(b.labels)) for b in batches.micro_batches(step)]
        for step in range(steps)
    ]

    def train_step(step: int) -> tuple[float, float]:
        total = torch.zeros((), device=device)
        for input_ids, labels in made[step]:
            total += micro_step(engine, input_ids.to(device), labels.to(device))
        dist.all_reduce(total)
        return float(total) / (len(made[step]) * dist.get_world_size()), float(engine.get_global_grad_norm())

    return record(job, timed_steps(train_step, steps))


def micro_step(engine: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward, and at the boundary the update. Returns the mean loss."""
    # The labels come shifted; the model would shift them itself.
    loss = engine(input_ids=input_ids, labels=labels, shift_labels=labels, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def deepspeed_config(job: JobConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, buffers as transformers derives them from the hidden size."""
    hidden = job.model.hidden_size
    return {
        "train_micro_batch_size_per_gpu": job.training.micro_batch_size,
        "gradient_accumulation_steps": job.accumulation_steps(world_size),
        "gradient_clipping": job.training.gradient_clipping,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": job.parallel.zero_stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        },
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }


def build(job: JobConfig, config: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """Their model, filled with the weights that ours starts from and partitioned module by module."""
    shape = job.model
    llama = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=job.training.sequence_length,
        attn_implementation=_ATTENTION[shape.attention_backend],  # type: ignore[call-arg] # no field of the class
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(llama).to(torch.bfloat16)
    weights = FirstWeights(job)
    our_names = {their_name(name): name for name in weights.left}
    for prefix, module in model.named_modules():
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        for key, parameter in own.items():
            filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            weights.draw(our_names[f"{prefix}.{key}"], filled)
            module._parameters[key] = nn.Parameter(filled)
        if own and job.parallel.zero_stage == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
    assert not weights.left, f"weights that transformers lacks: {sorted(weights.left)}"
    # Its tables are a buffer, which the meta device left without values.
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=llama)
    model.train()
    return model


def optimizer(model: nn.Module, job: JobConfig, device: torch.device) -> torch.optim.AdamW:
    """torch's fused AdamW, which DeepSpeed's own is no faster than and which needs no compiler; matrices decay."""
    matrices = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    settings = job.optimizer
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )
