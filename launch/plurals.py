"""Numbers with their noun: 1 step, 2 steps."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str = "") -> str:
    """2 -> "2 steps", 1 -> "1 step"; `plural` where it is not made by an s."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
