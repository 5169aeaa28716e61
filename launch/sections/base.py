"""What all sections of a job have in common."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
ListOf = Annotated[tuple[T, ...], Field(strict=False)]
"""A list in YAML, which nothing changes after loading."""

_Step = Annotated[int, Field(ge=1)]
StepRange = Annotated[tuple[_Step, _Step], Field(strict=False)]
"""First and last step, counted from 1."""


class Section(BaseModel):
    """Strict: no unknown keys, no conversion between types, no infinities, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
