"""Paths as users write them: `~` is the home directory, as in a shell, and never a folder of that name.

A shell does not expand the ~ of `--run=~/there` and `data.tokenizer=~/t.json`, and YAML knows none. Imports no torch.
"""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

UserPath = Annotated[str, Field(min_length=1), AfterValidator(expanduser)]
"""A key of a job that is a path or a glob of paths, read or written."""


def user_path(text: str) -> Path:
    """A path of a command line."""
    return Path(expanduser(text))
