"""A step's numbers are read while the GPU works on what it was given after that step."""

from __future__ import annotations

import pytest
import torch

from launch.step_outcome import StepOutcome

pytestmark = pytest.mark.gpu


def test_reading_waits_for_the_step_alone() -> None:
    loss, local_loss, norm = torch.tensor([2.5, 10.0, 0.75], device="cuda").unbind()
    outcome = StepOutcome(3, applied=True, loss=loss, local_loss=local_loss, grad_norm=norm)
    torch.cuda._sleep(2_000_000_000)  # about a second of the next step
    next_step = torch.cuda.current_stream().record_event()
    assert (outcome.loss, outcome.local_loss, outcome.grad_norm) == (2.5, 10.0, 0.75)
    assert not next_step.query(), "reading has waited for the step after"


def test_a_norm_that_the_host_has() -> None:
    """As of gradients in host memory."""
    loss = torch.tensor(2.5, device="cuda")
    for norm in (torch.tensor(0.75), 0.75):
        assert StepOutcome(1, applied=True, loss=loss, local_loss=loss, grad_norm=norm).grad_norm == 0.75
