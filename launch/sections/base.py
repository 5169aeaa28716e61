"""What all sections of a job have in common."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

UserPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path to write to: ~ is the home directory, as a shell would have it, and never a folder of that name."""


class Section(BaseModel):
    """Strict: no unknown keys, no conversion between types, no infinities, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
