"""Steps that a run leaves out (training.skip_steps): no rank reads their data, and no update is made.

A range is [first, last], both counted from 1 as in the log. Ranges ascend, and do not touch. Step s reads the same data
whether or not steps before it are left out, so nothing else of the data's order changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

StepRanges = tuple[tuple[int, int], ...]


def check_ranges(skipped: StepRanges) -> None:
    """Raises ValueError unless these are ranges as above."""
    for first, last in skipped:
        if first > last:
            raise ValueError(f"skip_steps has a range [{first}, {last}] that ends before it begins; turn it round")
    for one, other in pairwise(map(list, skipped)):
        if other[0] <= one[1] + 1:
            raise ValueError(
                f"skip_steps must ascend, with a step between ranges; join {one} and {other}, or sort them"
            )


def steps_made(skipped: StepRanges, start: int, stop: int) -> Iterator[int]:
    """The steps from `start` up to `stop`, counted from 0, that are not left out."""
    for first, last in (*skipped, (stop + 1, stop)):
        yield from range(start, min(first - 1, stop))
        start = max(start, last)


def steps_skipped(skipped: StepRanges, start: int, stop: int) -> list[range]:
    """Those that are, without empty ranges."""
    inside = (range(max(first - 1, start), min(last, stop)) for first, last in skipped)
    return [steps for steps in inside if steps]


def in_words(skipped: Iterable[range]) -> str:
    """Counted from 1: "steps 11 to 20, 31"."""
    named = [f"{steps.start + 1} to {steps.stop}" if len(steps) > 1 else f"{steps.stop}" for steps in skipped]
    return f"steps {', '.join(named)}" if named else "no step"
