"""What scripts write into documents: Markdown tables, each between two marks of its name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every row has as many cells as `heads`."""
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        assert len(row) == len(heads), row
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def renewed(page: str, parts: Mapping[str, str]) -> str:
    """The page with each of `parts` in place of what stands between its marks.

    Raises ValueError where the page has not `<!-- NAME -->` once, and `<!-- end of NAME -->` after it.
    """
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the page needs {begin} once, and {end} after it")
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def renew(page: Path, parts: Mapping[str, str]) -> None:
    """Writes `renewed` in place of the page. Raises ValueError, OSError."""
    page.write_text(renewed(page.read_text(), parts))


def print_or_renew(page: Path, parts: Mapping[str, str]) -> None:
    """The command line of a script that measures nothing: prints `parts`, or with --write renews the page."""
    if sys.argv[1:] == ["--write"]:
        renew(page, parts)
    else:
        print(*parts.values(), sep="\n\n")
