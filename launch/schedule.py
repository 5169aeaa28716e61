"""The learning rate of a step: a pure function, so that a resumed job needs no scheduler state."""

from __future__ import annotations

import math

from launch.sections.optimizer import OptimizerSection


def learning_rate_at(step: int, optimizer: OptimizerSection, total_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    Warmup, for every schedule: peak / warmup_steps at step 0, then linear, peak at step warmup_steps - 1. After it:

    - cosine: peak at step warmup_steps, half a cosine down to min_learning_rate_ratio * peak at the last step (SGDR,
      section 3);
    - wsd (warmup, stable, decay: MiniCPM, section 4): peak, then linear down to min_learning_rate_ratio * peak over the
      last decay_fraction of total_steps, reached at the last step; a decay longer than what the warmup leaves
      starts after it;
    - constant: peak.

    Steps from total_steps on keep the last step's value.
    """
    peak, warmup_steps = optimizer.learning_rate, optimizer.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    step, floor = min(step, total_steps - 1), peak * optimizer.min_learning_rate_ratio
    if optimizer.schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        progress = max(0.0, progress)  # a warmup that outlasts the job never starts the descent
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if optimizer.schedule == "wsd":
        decay_start = max(total_steps - round(optimizer.decay_fraction * total_steps), warmup_steps)
        if step >= decay_start:
            return peak + (floor - peak) * (step + 1 - decay_start) / (total_steps - decay_start)
    return peak
