"""Table, plot and page of `train_throughput.py`'s results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
BEGIN, END = "<!-- begin: train_throughput.py -->", "<!-- end: train_throughput.py -->"


def anchor_of(results: Results, row: dict[str, Any], anchor: str) -> dict[str, Any] | None:
    """The anchor row of the same run and depth; None where it is missing or failed."""
    same = [
        other
        for other in results.values()
        if other["row"] == anchor and other["run"] == row["run"] and other["layers"] == row["layers"]
    ]
    return next((other for other in same if "failed" not in other), None)


def table(results: Results, anchor: str) -> str:
    """Markdown: one line a row, runs one after the other."""
    lines = [
        "| run | row | layers | tokens/s/GPU | over the anchor | MFU, causal | MFU, full | peak GiB | estimate | loss |"
    ]
    lines.append("|" + " --- |" * 10)
    for row in sorted(results.values(), key=lambda row: (row["run"], -row["layers"])):
        start = f"| {row['run']} | {row['row']} | {row['layers']} |"
        if "failed" in row:
            lines.append(f"{start} {row['failed']} | | | | | | |")
            continue
        reference, rate = anchor_of(results, row, anchor), row["tokens_per_second_per_device"]
        ratio = f"{rate / reference['tokens_per_second_per_device']:.3f}" if reference else ""
        utilisation = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_causal", "mfu_full")]
        estimate = f"{row['estimated_gib']:.1f}" if "estimated_gib" in row else ""
        losses = " ".join(f"{loss:.3f}" for loss in row["losses"])
        figures = [f"{rate:,.0f}", ratio, *utilisation, f"{row['peak_gib']:.1f}", estimate, losses]
        lines.append(f"{start} {' | '.join(figures)} |")
    return "\n".join(lines)


def write_document(results: Results, anchor: str, folder: Path) -> None:
    """Renews the table in `folder`/throughput.md, between its marks, and `folder`/throughput.svg."""
    page = folder / "throughput.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(results, anchor)}\n\n{END}{after}")
