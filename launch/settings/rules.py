"""Rules that join keys of a job, or a job and its world size. All are checked; none stops the rest.

A `rule` refuses what cannot run. An `idle` reports a key that was set but does nothing beside the others; such a job
runs, because a size overridden to 1 for a moment should not require other keys to change.

A rule stands in `launch.sections`, with the section of the first key that it names; its report points there. It is not
checked if a key that it names is already in error, because its verdict would be about a value that has to change
anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.settings.violations import Violation, assigned
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


Idleness = Callable[[Job], str | None]
"""Why a key does nothing in this job, with both values and a remedy; None where it does something."""

IDLE: list[tuple[KeyPath, Idleness]] = []
"""Keys that other keys can leave without effect, as the sections have registered them."""


def idle(key: str) -> Callable[[Idleness], Idleness]:
    """Registers when section.key does nothing. It is asked where the key is not at its default."""

    def register(why: Idleness) -> Idleness:
        IDLE.append((tuple(key.split(".")), why))
        return why

    return register


def idle_keys(sections: Mapping[str, Any], world_size: int | None = None) -> list[str]:
    """A line for each key that was set and does nothing, in the order of `sections`, which are all of a valid job."""
    job, order, told = Job(sections, world_size), list(sections), []
    for path, why in sorted(IDLE, key=lambda entry: order.index(str(entry[0][0]))):
        section, key = map(str, path)
        value = job.value(path)
        if value != type(sections[section]).model_fields[key].get_default(call_default_factory=True):
            reason = why(job)
            if reason is not None:
                told.append(f"{assigned(path, value)} does nothing: {reason}")
    return told
