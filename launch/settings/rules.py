"""What joins keys of a job, or a job and its world size: all rules are checked, none stops the rest.

A rule stands in `launch.sections`, with the section of the first key that it names; its report points there. It is left
out where a key that it names is already in error, since its verdict would be about a value that has to change anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.settings.violations import Violation
from launch.settings.yaml_strict import KeyPath


@dataclass(frozen=True)
class Job:
    """The sections as the rules see them; one that is in error has only its sound keys."""

    sections: Mapping[str, Any]
    world_size: int | None

    def __getattr__(self, name: str) -> Any:
        return self.sections[name]

    def value(self, path: KeyPath) -> object:
        """The value at ("section", "key")."""
        section, key = path
        return getattr(self.sections[str(section)], str(key))


Rule = Callable[[Job], None]
"""Raises ValueError with both numbers and a remedy."""

RULES: list[tuple[tuple[KeyPath, ...], Rule]] = []
"""The keys that each rule reads, and the rule, as the sections have registered them."""


def rule(*needs: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the keys it reads, as section.key; the first is the one its report points at."""

    def register(check: Rule) -> Rule:
        RULES.append((tuple(tuple(need.split(".")) for need in needs), check))
        return check

    return register


def violations(
    sections: Mapping[str, Any], broken: frozenset[KeyPath], world_size: int | None = None
) -> list[Violation]:
    """Every broken rule, in the order of `sections`, which are all of a job.

    `broken` holds the ("section", "key") or ("section",) paths already in error.
    """
    job, found = Job(sections, world_size), []
    order = list(sections)
    for needs, check in sorted(RULES, key=lambda entry: order.index(str(entry[0][0][0]))):
        if any(path in broken or path[:1] in broken for path in needs):
            continue
        try:
            check(job)
        except ValueError as error:
            found.append(Violation(needs[0], str(error), job.value(needs[0])))
    return found
