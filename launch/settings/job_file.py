"""Turns the text of a job file, and overrides of its keys, into sections that are valid and agree.

All faults are found before any is reported: those of the YAML, of the overrides, of each section, and of the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from launch.settings.rules import violations
from launch.settings.violations import ConfigError, Violation, kept_by_a_run, section_violations, unknown_section
from launch.settings.yaml_strict import KeyPath, read_yaml
from launch.weights.stored_model import RUN_FILE, WeightsError, stored_keys, stored_model
from model.config import SHAPE_KEYS


def read_job(
    types: Mapping[str, type[BaseModel]],
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    *,
    resolved: bool = False,
) -> dict[str, BaseModel]:
    """The sections of the job in `text`, each of its type, valid, and all in agreement.

    `source` is what a report calls the text. A `resolved` job has every key: none is taken from initial weights.
    Raises ConfigError with every fault.
    """
    document = read_yaml(text)
    places: dict[KeyPath, str] = {path: f"{source}:{line}" for path, line in document.lines.items()}
    found = [
        Violation(problem.path, problem.message, place=f"{source}:{problem.line}") for problem in document.problems
    ]
    raw = document.value if document.value is not None else {}
    if not isinstance(raw, dict):
        found.append(Violation((), f"must be sections of keys: {', '.join(types)}", place=f"{source}:1"))
        raw = {}
    if any(not problem.path for problem in document.problems):  # half a document would only raise false alarms
        raise ConfigError(source, found)
    found += _apply_overrides(raw, overrides, places)
    for name in [name for name in raw if name not in types]:
        found.append(Violation((name,), unknown_section(name, types), unknown=True))

    unreadable = [] if resolved else _take_keys_from_weights(raw.get("model"), found)
    sections: dict[str, BaseModel] = {}
    broken: set[KeyPath] = set()
    for name, section in types.items():
        sections[name], faults = _validate_section(name, section, raw.get(name), types)
        if name == "model" and unreadable:
            faults = unreadable  # keys that would have come from there are not what is missing
            broken.add((name,))
        found += faults
        for fault in faults:
            broken.update(path[:2] for path in (fault.path, *fault.related))
    found += violations(sections, frozenset(broken), world_size)
    if Path(source).name == RUN_FILE:
        found = [kept_by_a_run(violation) for violation in found]
    if found:
        raise ConfigError(source, [_placed(violation, places, source) for violation in found])
    return sections


def _validate_section(
    name: str, section: type[BaseModel], raw: object, types: Mapping[str, type[BaseModel]]
) -> tuple[BaseModel, list[Violation]]:
    """The section, or as much of it as is sound, and its faults."""
    values = {} if raw is None else raw
    try:
        return section.model_validate(values), []
    except ValidationError as error:
        faults = section_violations(name, section, error, types)
        wrong = {fault.path[1] for fault in faults if len(fault.path) > 1}
        sound = values if isinstance(values, Mapping) else {}
        sound = {key: value for key, value in sound.items() if key in section.model_fields and key not in wrong}
        return section.model_construct(**_of_their_types(section, sound)), faults


def _of_their_types(section: type[BaseModel], sound: Mapping[str, object]) -> dict[str, Any]:
    """Sound values as their section would hold them, which rules read: a blend is of corpora, not of groups of keys.

    One that its section would derive from others, such as head_dim: null, is left at its default.
    """
    found: dict[str, Any] = {}
    for key, value in sound.items():
        field: dict[str, Any] = {key: (section.model_fields[key].annotation, section.model_fields[key])}
        part = create_model(section.__name__, __config__=section.model_config, **field)
        with suppress(ValidationError):
            found |= dict(part.model_validate({key: value}))
    return found


def _take_keys_from_weights(section: object, found: list[Violation]) -> list[Violation]:
    """Adds to a raw `model` section with init_from the keys that it leaves to those weights, and to `found` the
    section's own keys that do not fit them. Returns the fault where nothing can be read there."""
    if not isinstance(section, dict) or not isinstance(section.get("init_from"), str):
        return []
    path, folder = ("model", "init_from"), expanduser(section["init_from"])
    section["init_from"] = folder  # the model's own type knows nothing of users and their homes
    try:
        stored_model(Path(folder))  # what is wrong there is not to be told as this file's
        stored = stored_keys(Path(folder))
    except WeightsError as error:
        return [Violation(path, str(error), folder)]
    differing = [key for key in SHAPE_KEYS if key in section and section[key] != stored.get(key)]
    if differing:
        listed = ", ".join(f"{key} ({section[key]} here, {stored.get(key)} there)" for key in differing)
        message = f"these weights are of another model: {listed}; leave these keys out, or correct them"
        found.append(Violation(path, message, folder))
    section |= {key: value for key, value in stored.items() if key not in section}
    return []


def _apply_overrides(raw: dict, overrides: Sequence[str], places: dict[KeyPath, str]) -> list[Violation]:
    """Writes each `section.key=value` into `raw` and notes its place; returns the faults of form."""
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path: KeyPath = tuple(key.split("."))
        if not equals or len(path) < 2 or not all(path):
            message = f"{override!r} is not of the form section.key=value, such as training.max_steps=100"
            faults.append(Violation((), message, place="command line"))
            continue
        document = read_yaml(text)
        faults += [Violation(path, problem.message, text, "command line") for problem in document.problems]
        if document.problems:
            continue
        group = raw
        for depth, part in enumerate(path[:-1]):
            if group.get(part) is None:
                group[part] = {}
            group = group[part]
            if not isinstance(group, dict):
                above = ".".join(map(str, path[: depth + 1]))
                faults.append(Violation(path, f"{above} is a value, not a group of keys", text, "command line"))
                break
        else:
            group[path[-1]] = document.value
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]
            places[path] = "command line"
    return faults


def _placed(violation: Violation, places: Mapping[KeyPath, str], source: str) -> Violation:
    """The violation with the place of its key, else of a key in it, else of the nearest group around it."""
    if violation.place:
        return violation
    path = violation.path
    around = [path[:depth] for depth in range(len(path), 0, -1) if path[:depth] in places]
    if around[:1] != [path]:
        around = [*(known for known in places if path and known[: len(path)] == path), *around]
    return replace(violation, place=places[around[0]] if around else source)
