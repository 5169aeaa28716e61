"""DeepSpeed's stage 3 with fewer passes over memory around its messages.

Shapes: P ranks of dp x cp, N elements of a parameter, C = ceil(N / P) elements of each rank's part.

DeepSpeed 0.19.8 copies every parameter once more after it has been gathered. It casts, copies and divides gradients in
separate passes before they are reduced, and lets the host wait between micro-batches. Without that, the step of the 8B
shape on two GPUs takes 3.5 % less time (docs/log.md). Each function here replaces a method of one optimizer or one
model by another of the same name; the numbers do not change. What GPUs of one host do without messages is in
`zero_shares` and `gradient_exchange`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

from parallel.gradient_exchange import add_mean, parts_of_all
from parallel.zero_replacing import clip_in_update, grad_norm, replace


def gather_without_copies(model: nn.Module) -> None:
    """Gathers the parameters of a unit in one message, each into its own memory.

    DeepSpeed gathers their parts one behind the other for each rank, and then copies every parameter out of P places.
    """
    for parameter in model.parameters():
        theirs = parameter.all_gather_coalesced  # type: ignore[attr-defined]
        parameter.all_gather_coalesced = partial(_gather, theirs)  # type: ignore[attr-defined]


class Gathering:
    """Parameters on their way into `wholes`; what DeepSpeed's coordinator waits for."""

    def __init__(self, parameters: Sequence[Any], wholes: Sequence[Tensor], message: Any):
        """`message.wait()` lets the current stream wait until they have arrived."""
        self._parameters, self._wholes, self._message = parameters, wholes, message

    def wait(self, handle_dependency: bool = True) -> None:
        """Lets the current stream wait, not the host."""
        if not self._parameters:
            return  # all of them ask, the first one is answered
        self._message.wait()
        for parameter, whole in zip(self._parameters, self._wholes, strict=True):
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._parameters, self._wholes = [], []


def _gather(theirs: Any, parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
    parameters = list(parameters)
    group = parameters[0].ds_process_group
    if group.size() == 1 or quantize or any(one.ds_secondary_tensor is not None for one in parameters):
        return theirs(parameters, safe_mode=safe_mode, quantize=quantize)
    parameters = begin_gathering(parameters)
    parts = [parameter.ds_tensor.to(parameter.device, non_blocking=True) for parameter in parameters]
    wholes = [part.new_empty(group.size() * len(part)) for part in parts]
    with _coalescing_manager(group, async_ops=True) as message:
        for whole, part in zip(wholes, parts, strict=True):
            dist.all_gather_into_tensor(whole, part, group=group)
    return Gathering(parameters, wholes, message)


def begin_gathering(parameters: Iterable[Any]) -> list[Any]:
    """Marks them as under way, in the order that is the same on every rank; and lets what the current stream is given
    from now on come after what has been computed by now."""
    parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
    for parameter in parameters:
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE, parameter.ds_summary()
        parameter.ds_status = ZeroParamStatus.INFLIGHT
    _after_computing(parameters[0].device)
    return parameters


def _after_computing(device: torch.device) -> None:
    """Lets what the current stream is given from now on come after what has been computed by now.

    The next unit is gathered while this one computes, and no sooner: DeepSpeed's messages run ahead of the computing as
    far as the host does, and each unit that waits takes memory, which is lost to all other streams.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))


def reduce_without_interleaving(optimizer: Any) -> None:
    """Reduces the gradients of a unit in one message, each from its own memory, which one pass has filled.

    DeepSpeed casts them into one buffer, copies that into another where each rank's parts lie together, and divides it.
    Needs `contiguous_gradients` off: the first of these copies comes before the method that is replaced.
    """
    assert not optimizer.contiguous_gradients
    replace(optimizer, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", partial(_average_and_scatter, optimizer))


def _average_and_scatter(optimizer: Any, parameters: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """This rank's parts of the gradients' mean over dp x cp, without padding."""
    group = parameters[0].ds_process_group
    gradients = [parameter.grad for parameter in parameters]
    _read_here(gradients)
    lengths = [group.size() * parameter.partition_numel() for parameter in parameters]  # with padding, never read
    wholes = list(torch.empty(sum(lengths), dtype=dtype, device=gradients[0].device).split(lengths))
    filled = [whole[: gradient.numel()].view_as(gradient) for whole, gradient in zip(wholes, gradients, strict=True)]
    torch._foreach_copy_(filled, gradients)
    parts = [whole.new_empty(len(whole) // group.size()) for whole in wholes]
    with _coalescing_manager(group, async_ops=True) as message:
        for part, whole in zip(parts, wholes, strict=True):
            dist.reduce_scatter_tensor(part, whole, dist.ReduceOp.AVG, group=group)
    message.wait()  # the current stream, not the host
    ends = [gradient.numel() - group.rank() * len(part) for gradient, part in zip(gradients, parts, strict=True)]
    mean = [part[: max(end, 0)] for part, end in zip(parts, ends, strict=True)]
    return [part.to(optimizer.gradient_accumulation_dtype) for part in mean]


def accumulate_together(optimizer: Any) -> None:
    """Adds a unit's reduced gradients to those of earlier micro-batches in one pass, instead of one for each."""
    assert not optimizer.offload_optimizer
    replace(optimizer, "partition_grads", partial(_accumulate, optimizer))


def _accumulate(optimizer: Any, parameters: Sequence[Any], parts: list[Tensor]) -> None:
    sums = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    targets = [sums[parameter.ds_id][: len(part)] for parameter, part in zip(parameters, parts, strict=True)]
    if optimizer.micro_step_id == 0:
        torch._foreach_copy_(targets, parts)
    else:
        torch._foreach_add_(targets, parts)
    for parameter in parameters:
        parameter.grad = None


def exchange_and_accumulate(optimizer: Any) -> None:
    """Sends the gradients of a unit as they are and adds all ranks' parts to those of earlier micro-batches in one pass
    (`parallel.gradient_exchange`), in place of `reduce_without_interleaving` and `accumulate_together`.

    For gradients that are narrower than what accumulates them, and ranks of one host.
    """
    assert not optimizer.offload_optimizer and not optimizer.contiguous_gradients
    replace(optimizer, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", _exchange)
    replace(optimizer, "partition_grads", partial(_accumulate_means, optimizer))


def _exchange(parameters: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    gradients = [parameter.grad.view(-1) for parameter in parameters]
    _read_here(gradients)
    return parts_of_all(gradients, parameters[0].ds_process_group)


def _accumulate_means(optimizer: Any, parameters: Sequence[Any], received: list[Tensor]) -> None:
    sums = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for parameter, parts in zip(parameters, received, strict=True):
        add_mean(sums[parameter.ds_id][: parts.shape[1]], parts, first=optimizer.micro_step_id == 0)
        parameter.grad = None


def _read_here(gradients: Sequence[Tensor]) -> None:
    """Whenever these are freed, their memory is given away only after what the current stream has been given by then.

    They were made on the stream that computes. DeepSpeed says so only of those of which this rank keeps a part, and
    frees the others, such as those of vectors of fewer elements than there are ranks, before they may have been read.
    """
    for gradient in gradients:
        if gradient.is_cuda:
            gradient.record_stream(torch.cuda.current_stream(gradient.device))


class _ReduceStream(torch.cuda.Stream):
    """Gradients are reduced on it. Where DeepSpeed lets the host wait for it, the device's current stream does instead,
    and that once all micro-batches of the step have been issued."""

    optimizer: Any

    def synchronize(self) -> None:
        if self.optimizer.is_gradient_accumulation_boundary():
            torch.cuda.current_stream(self.device).wait_stream(self)


def keep_host_ahead(optimizer: Any) -> None:
    """Between two micro-batches neither the host nor the device waits for gradients.

    DeepSpeed lets the host wait until the last ones are reduced, and so the device until the host has issued again.
    Nothing on the host reads gradients, unless the optimizer is offloaded.
    """
    assert not optimizer.offload_optimizer
    if optimizer.reduce_and_partition_stream is not None:  # None on CPUs
        optimizer.reduce_and_partition_stream = _ReduceStream()
        optimizer.reduce_and_partition_stream.optimizer = optimizer


def measure_norm_once(optimizer: Any) -> None:
    """The norm of the gradients by one pass: DeepSpeed copies them to fp64 first."""
    replace(optimizer, "get_grad_norm_direct", partial(grad_norm, optimizer))


def update_in_one_pass(optimizer: Any) -> None:
    """AdamW clips the gradients as it reads them, where they were accumulated.

    DeepSpeed copies all of them into a flat tensor and multiplies that by the clipping factor. Needs the fused AdamW,
    which divides by `grad_scale`.
    """
    assert not optimizer.offload_optimizer
    replace(optimizer, "_prepare_fp32_grad_for_sub_group", partial(_lend_gradients, optimizer))
    replace(optimizer, "unscale_and_clip_grads", partial(clip_in_update, optimizer))


def _lend_gradients(optimizer: Any, sub_group: int) -> None:
    """Lets AdamW see a sub-group's gradients where they lie: one behind the other, as the parameters do."""
    gradients, flat = optimizer.averaged_gradients[sub_group], optimizer.grad_partitions_flat_buffer
    start = gradients[0].storage_offset() - flat.storage_offset()
    end = start + sum(map(len, gradients))
    master = optimizer.fp32_partitioned_groups_flat[sub_group]
    assert end - start == len(master) and gradients[-1].data_ptr() == flat[end - len(gradients[-1])].data_ptr()
    master.grad = flat[start:end]
    optimizer.averaged_gradients[sub_group] = None
