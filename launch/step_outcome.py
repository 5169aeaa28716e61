"""The results of a training step, on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class StepOutcome:
    """One step's results.

    Reading a number waits until this step is over, and for nothing that the device was given since: the values travel
    to page-locked memory behind the step, whereas `Tensor.item` would wait for the step that has been started
    meanwhile, too.
    """

    def __init__(self, step: int, *, applied: bool, loss: Tensor, local_loss: Tensor, grad_norm: Tensor | float):
        """`loss` and `local_loss` are scalars on the device, and so is `grad_norm`, unless the host has it already; see
        the properties."""
        self.step = step
        """Updates done, this one included."""
        self.applied = applied
        """False where a loss scaler skipped the update."""
        norm = grad_norm if isinstance(grad_norm, Tensor) else torch.full_like(loss, grad_norm)
        values = torch.stack([value.double() for value in (loss, local_loss, norm.to(loss.device))])
        self._read: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._read = torch.cuda.current_stream(values.device).record_event()

    @property
    def loss(self) -> float:
        """Mean over the global batch's tokens, nats."""
        return self._value(0)

    @property
    def local_loss(self) -> float:
        """This rank's summed loss, to tell which rank went wrong."""
        return self._value(1)

    @property
    def grad_norm(self) -> float:
        """2-norm of the gradient before clipping."""
        return self._value(2)

    def _value(self, index: int) -> float:
        if self._read is not None:
            self._read.synchronize()
        return self._values[index].item()
