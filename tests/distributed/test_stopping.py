"""Ranks that are asked to stop at different moments stop at the same step."""

from __future__ import annotations

import torch.distributed as dist

from launch.stopping import StopVote
from tests.distributed.harness import run_distributed

STEPS = 8
CASES = [({}, STEPS), ({2: 3}, 4), ({0: 5, 1: 2, 2: 4}, 3), ({0: 0}, 1)]
"""Rank -> the step from which on it wants to stop; the step at which all answer yes."""


def answers() -> list[list[bool]]:
    """What this rank hears at each step of each case; at first rank 0 votes while the others cannot yet."""
    heard, early = [], StopVote(lambda: False)
    if dist.get_rank() == 0:
        early()
    dist.barrier()
    if dist.get_rank():
        early()
    for asked_at, _ in CASES:
        wanted = iter(step >= asked_at.get(dist.get_rank(), STEPS) for step in range(STEPS))
        vote = StopVote(lambda wanted=wanted: next(wanted))
        heard.append([vote() for _ in range(STEPS)])
    return heard


def test_one_request_is_enough_and_all_hear_of_it_a_step_later_without_a_wait() -> None:
    expected = [[step >= stops for step in range(STEPS)] for _, stops in CASES]
    assert run_distributed(answers, 3) == [expected] * 3
