"""What is wrong with a job, one entry for each fault, and the report that shows all of them at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from launch.plurals import counted
from launch.settings.field_text import describe_default, describe_field, describe_type, nested_model, yaml_scalar
from launch.settings.yaml_strict import KeyPath

_UNSET = object()
_WORDS = {
    "Input should be": "must be",
    "String should": "must",
    "Tuple": "the list",
    "a valid tuple": "a list",
    " after validation": "",
}
"""Pydantic's words, and ours."""


@dataclass(frozen=True)
class Violation:
    """One fault: the key it concerns, the value found there, and what is wrong and how to mend it."""

    path: KeyPath
    message: str
    value: object = _UNSET
    place: str = ""
    related: tuple[KeyPath, ...] = ()
    """Other keys whose values the fault may lie in."""
    unknown: bool = False
    """The key is none of this program's."""

    def __str__(self) -> str:
        name = dotted(self.path) if self.value is _UNSET else assigned(self.path, self.value)
        return f"{': '.join(part for part in (self.place, name) if part)}\n    {self.message}"


class ConfigError(ValueError):
    """A job that cannot run. `str()` is one report of every violation."""

    def __init__(self, source: str, violations: Sequence[Violation]):
        title = f"{source}: {counted(len(violations), 'error')} in the job's configuration"
        super().__init__("\n".join([title, *(f"  {violation}".replace("\n", "\n  ") for violation in violations)]))


def dotted(path: KeyPath) -> str:
    """("optimizer", "betas", 1) -> "optimizer.betas[1]"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def assigned(path: KeyPath, value: object) -> str:
    """("optimizer", "eps"), 1.0 -> "optimizer.eps = 1.0", where long values lose their end."""
    shown = yaml_scalar(value)
    return f"{dotted(path)} = {shown if len(shown) <= 60 else shown[:57] + '...'}"


def kept_by_a_run(violation: Violation) -> Violation:
    """The violation as it may be in a file that this program wrote when the run began: nobody mistyped."""
    remedy = f"{violation.message} In the file of a run it is a key of another version of this program: remove the line"
    return replace(violation, message=remedy) if violation.unknown else violation


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choice that looks most like `word`."""
    return difflib.get_close_matches(word, choices, n=1, cutoff=0.0)[0]


def section_violations(
    name: str, section: type[BaseModel], error: ValidationError, sections: Mapping[str, type[BaseModel]]
) -> list[Violation]:
    """Pydantic's errors for one section, in the words of this project."""
    found = [_violation(name, section, dict(detail), sections) for detail in error.errors(include_url=False)]
    return list({(fault.path, fault.message): fault for fault in found}.values())  # of a union each part complains


def unknown_section(name: str, sections: Mapping[str, type[BaseModel]]) -> str:
    """Message for a top-level key that is no section."""
    owners = [other for other, section in sections.items() if name in section.model_fields]
    guess = f"{owners[0]}.{name}" if owners else nearest(name, list(sections))
    return f"unknown section; did you mean {guess}? Sections: {', '.join(sections)}"


def _violation(name: str, section: type[BaseModel], detail: dict, sections: Mapping[str, type[BaseModel]]) -> Violation:
    kind, location = detail["type"], tuple(detail["loc"])
    path = (name, *location)
    if kind == "extra_forbidden":
        owner = _owner(section, location)
        guess = _unknown_key(str(location[-1]), name, location, owner, sections)
        return Violation(path, guess, detail["input"], unknown=True)
    if kind == "missing":
        info = _field(section, location)
        if info is not None and isinstance(location[-1], int):
            return Violation(path[:-1], f"too short; give {describe_field(info)}", detail["input"])
        purpose = f" ({_first_sentence(info.description)})" if info is not None and info.description else ""
        takes = describe_field(info) if info is not None else "a value"
        return Violation(path, f"missing{purpose}; give {takes}")
    if kind in ("value_error", "assertion_error"):  # raised by a validator: its text is already ours
        message = str(detail["ctx"]["error"])
        if location:
            return Violation(path, message, detail["input"])
        mentioned = [word for word in re.findall(r"\w+", message) if word in section.model_fields]
        if not mentioned:
            return Violation(path, message)
        found = detail["input"].get(mentioned[0], _UNSET) if isinstance(detail["input"], dict) else _UNSET
        related = tuple((*path, key) for key in mentioned[1:])
        return Violation((*path, mentioned[0]), message, found, related=related)
    group = section.model_fields.get(str(location[0])) if len(location) > 1 else None
    if group is not None and get_origin(group.annotation) is dict:
        value = _UNSET if location[-1] == "[key]" else detail["input"]
        return Violation((name, *location[:2]), _unusable_entry(group, location, detail), value)
    info = _field(section, location)
    if kind == "dict_type" and info is not None:
        return Violation(path, f"must be a {describe_field(info)}", detail["input"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        owner = _owner(section, (*location, ""))
        return Violation(path, f"must be a group of keys: {', '.join(owner.model_fields)}", detail["input"])
    problem = detail["msg"]
    for theirs, ours in _WORDS.items():
        problem = problem.replace(theirs, ours)
    takes = ""
    if kind == "string_pattern_mismatch" and info is not None and info.description:
        takes = f" ({' '.join(info.description.split()).rstrip('.')})"
    elif info is not None:
        takes = f"; give {describe_field(info)}" + (
            "" if info.is_required() else f" (default: {describe_default(info)})"
        )
    if kind == "literal_error":
        problem = "is none of these"
    if isinstance(detail["input"], str) and kind in ("int_type", "float_type", "bool_type"):
        problem += ", not text"
    if kind == "string_type" and isinstance(detail["input"], int | float | Mapping):
        problem += "; in quotes it is one"
    return Violation(path, problem + takes, detail["input"])


def _unusable_entry(group: FieldInfo, location: KeyPath, detail: dict) -> str:
    """Message for the name or the value of one entry of a group with free names."""
    purpose = f" ({' '.join((group.description or '').split()).rstrip('.')})"
    if location[-1] == "[key]":
        return f"this name {detail['msg'].replace('String should', 'must')}{purpose}"
    quote = "" if detail["input"] is None or isinstance(detail["input"], list | dict) else "; in quotes it is text"
    return f"must be {describe_type(get_args(group.annotation)[1])}{quote}{purpose}"


def _first_sentence(text: str) -> str:
    """The text up to its first period, colon or semicolon, on one line."""
    return re.split(r"[.:;](?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


def _unknown_key(
    key: str, name: str, location: KeyPath, owner: type[BaseModel], sections: Mapping[str, type[BaseModel]]
) -> str:
    if key not in owner.model_fields:
        for other, section in sections.items():
            if other != name and key in section.model_fields:
                return f"unknown key here; it belongs in section {other}: {other}.{key}"
    prefix = dotted((name, *location[:-1]))
    return f"unknown key; did you mean {prefix}.{nearest(key, list(owner.model_fields))}?"


def _owner(section: type[BaseModel], location: KeyPath) -> type[BaseModel]:
    """The model that the last part of `location` is looked up in."""
    owner = section
    for part in location[:-1]:
        info = owner.model_fields.get(str(part))
        owner = (nested_model(info.annotation) if info is not None else None) or owner
    return owner


def _field(section: type[BaseModel], location: KeyPath) -> FieldInfo | None:
    """The field at `location`; that of the whole list for one of its items."""
    names = tuple(part for part in location if isinstance(part, str))
    return _owner(section, names).model_fields.get(names[-1]) if names else None
