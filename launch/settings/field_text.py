"""Says in words what a configuration field takes, for the error report and the reference."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SCALARS = {int: "integer", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe_type(annotation: Any) -> str:
    """`int` -> "integer", `Literal["a", "b"]` -> "one of a, b", `str | None` -> "text or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(yaml_scalar, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else describe_type(part) for part in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} x "
        return f"list of {count}{describe_type(arguments[0])}"
    if origin is dict:
        return f"group of names, each with {describe_type(arguments[1])}"
    if origin is Annotated:
        return describe_field(FieldInfo.from_annotation(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"group of {', '.join(annotation.model_fields)}"
    return _SCALARS[annotation]


def describe_field(info: FieldInfo) -> str:
    """Type and bounds: "integer > 0"."""
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in info.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(constraint, name)
    ]
    kind = describe_type(info.annotation)
    optional = " or null" if kind.endswith(" or null") else ""
    return " ".join([kind.removesuffix(optional), *([" and ".join(bounds)] if bounds else [])]) + optional


def describe_default(info: FieldInfo) -> str:
    """The default as it would be written in YAML, or "required"."""
    if info.is_required():
        return "required"
    return yaml_scalar(info.get_default(call_default_factory=True))


def yaml_scalar(value: object) -> str:
    """One value as a user would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value and value == value.strip() else f'"{value}"'
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {yaml_scalar(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_scalar, value))}]"
    return str(value)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside `annotation`, looking through `| None`."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
