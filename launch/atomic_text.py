"""Files read while they change: who opens one finds all of the old text or all of the new. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Puts a file with `text` in the place of `path`. Raises OSError, leaving the old one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
