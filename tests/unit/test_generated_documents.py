"""What scripts write into documents is what they write now, from the code and from the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layout_costs
import longest_context
import loss_curves
import ring_attention
import scaling_model
import shipped_jobs
import throughput_report
from attention_contest.results import load
from documents import markdown, renewed
from launch.schema_docs import reference

DOCS = Path(__file__).resolve().parents[2] / "docs"


def results(name: str) -> dict[str, Any]:
    path = DOCS / name
    return json.loads(path.read_text()) if path.exists() else {}


PARTS: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "choosing.md": (lambda: {shipped_jobs.MARK: shipped_jobs.table()}, "shipped_jobs.py --write"),
    "longest_context.md": (
        lambda: {longest_context.MARK: longest_context.table(results("longest_context.json"))},
        "longest_context.py --output docs/longest_context.json --document docs/longest_context.md",
    ),
    "parallelism.md": (lambda: {layout_costs.MARK: layout_costs.table()}, "layout_costs.py --write"),
    "ring_attention.md": (
        lambda: ring_attention.summaries(load(DOCS / "ring_attention.json")),
        "ring_attention.py --output docs/ring_attention.json --report",
    ),
    "scaling.md": (scaling_model.tables, "scaling_model.py --write"),
    "throughput.md": (
        lambda: {throughput_report.MARK: throughput_report.tables(results("throughput.json"))},
        "train_throughput.py --output docs/throughput.json --document docs",
    ),
}
"""Page: what stands between its marks, and what renews it."""
WHOLE: dict[str, tuple[Callable[[], str], str]] = {
    "configuration.md": (reference, "python -m launch.schema_docs > docs/configuration.md"),
    "loss_curves.md": (
        lambda: loss_curves.page(results("loss_curves.json")),
        "python benchmarks/loss_curves.py --output docs/loss_curves.json --document docs",
    ),
    "ring_attention_table.md": (
        lambda: ring_attention.full_table(load(DOCS / "ring_attention.json")),
        "python benchmarks/ring_attention.py --output docs/ring_attention.json --report",
    ),
}


@pytest.mark.parametrize("page", PARTS)
def test_generated_parts_are_current(page: str) -> None:
    parts, script = PARTS[page]
    text = (DOCS / page).read_text()
    assert text == renewed(text, parts()), f"renew it: python benchmarks/{script}"


@pytest.mark.parametrize("page", WHOLE)
def test_generated_pages_are_current(page: str) -> None:
    made, command = WHOLE[page]
    assert (DOCS / page).read_text() == made(), f"renew it: {command}"


def test_every_generated_part_is_held() -> None:
    marked = {path.name for path in DOCS.glob("*.md") if "<!-- end of " in path.read_text()}
    assert marked == PARTS.keys()


def test_renewing_replaces_what_is_between_the_marks() -> None:
    page = "a <!-- one -->old<!-- end of one --> b <!-- two --><!-- end of two --> c"
    new = renewed(page, {"one": "1", "two": markdown(["x", "y"], [["1", ""]])})
    assert new == (
        "a <!-- one -->\n\n1\n\n<!-- end of one --> b "
        "<!-- two -->\n\n| x | y |\n| --- | --- |\n| 1 |  |\n\n<!-- end of two --> c"
    )
    assert renewed(new, {"one": "1"}) == new
    for damaged in ("no marks", "<!-- one -->", "<!-- end of one --><!-- one -->", page + page):
        with pytest.raises(ValueError, match="needs <!-- one --> once, and <!-- end of one --> after it"):
            renewed(damaged, {"one": "1"})
