"""Table, plot and page of `train_throughput.py`'s results: rows are compared within one run only."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
BEGIN, END = "<!-- train_throughput.py -->", "<!-- end -->"
_COLOURS = {"ringzero": "tab:blue", "torchtitan": "tab:orange", "huggingface": "tab:green"}
_COLUMNS = ["row", "layers", "tokens/s/GPU", "over the anchor", "MFU, causal", "MFU, full", "peak GiB"]
_COLUMNS += ["estimate / peak", "loss of each step"]


def over_anchor(results: Results, row: dict[str, Any], anchor: str) -> float | None:
    """A row's rate over that of the anchor of its run and depth; None where that is missing or failed."""
    for other in results.values():
        same = all(other[key] == row[key] for key in ("run", "layers"))
        if same and other["row"] == anchor and "failed" not in other:
            return row["tokens_per_second_per_device"] / other["tokens_per_second_per_device"]
    return None


def comparison(results: Results, anchor: str) -> str:
    """Markdown: our best row of each kind over the best of each peer, through the anchors of their runs.

    A row that several runs measured counts with the median of its ratios.
    """
    best = _best(results, anchor)
    lines = ["| ours, best | theirs, best | ours / theirs |", "| --- | --- | --- |"]
    for kind, (ratio, name) in sorted(best.items()):
        length, system, zero_stage, tensor_parallel = kind
        if system != "ringzero":
            continue
        for peer in ("torchtitan", "huggingface"):
            theirs = [found for other, found in best.items() if other[:2] == (length, peer)]
            if theirs:
                their_ratio, their_name = max(theirs)
                lines.append(f"| {name} | {their_name} | {ratio / their_ratio:.3f} |")
        if tensor_parallel > 1 and (length, system, zero_stage, 1) in best:
            their_ratio, their_name = best[length, system, zero_stage, 1]
            lines.append(f"| {name} | {their_name} | {ratio / their_ratio:.3f} |")
    return "\n".join(lines)


def _best(results: Results, anchor: str) -> dict[tuple[int, str, int, int], tuple[float, str]]:
    """Of the deepest model: (sequence length, system, ZeRO stage, tensor_parallel_size) -> best ratio to an anchor, and
    whose it is."""
    ratios: dict[str, list[float]] = {}
    kinds: dict[str, tuple[int, str, int, int]] = {}
    deepest = max((row["layers"] for row in results.values()), default=0)
    for row in results.values():
        ratio = over_anchor(results, row, anchor) if row["layers"] == deepest and "failed" not in row else None
        if ratio is not None:
            ratios.setdefault(row["row"], []).append(ratio)
            kinds[row["row"]] = (row["sequence_length"], row["system"], row["zero_stage"], row["tensor_parallel_size"])
    best: dict[tuple[int, str, int, int], tuple[float, str]] = {}
    for name, kind in kinds.items():
        found = (statistics.median(ratios[name]), name)
        best[kind] = max(found, best.get(kind, found))
    return best


def table(results: Results, anchor: str) -> str:
    """Markdown: one table for each run."""
    lines = []
    for run in dict.fromkeys(row["run"] for row in results.values()):
        rows = [row for row in results.values() if row["run"] == run]
        gpu = next((f"{row['gpus']} x {row['gpu']}, torch {row['torch']}, " for row in rows if "gpu" in row), "")
        lines += [f"Run {run}: {gpu}{rows[0]['measured'][:10]}", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
        lines += [_line(results, row, anchor) for row in sorted(rows, key=lambda row: -row["layers"])]
        lines.append("")
    return "\n".join(lines).rstrip()


def _line(results: Results, row: dict[str, Any], anchor: str) -> str:
    if "failed" in row:
        return f"| {row['row']} | {row['layers']} | {row['failed'].replace('|', ' ')} |" + " |" * (len(_COLUMNS) - 3)
    ratio = over_anchor(results, row, anchor)
    cells = [row["row"], str(row["layers"]), f"{row['tokens_per_second_per_device']:,.0f}"]
    cells.append(f"{ratio:.3f}" if ratio is not None else "")
    cells += [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_causal", "mfu_full")]
    cells.append(f"{row['peak_gib']:.1f}")
    cells.append(
        f"{row['estimated_gib'] / row['peak_gib']:.2f}" if row.get("estimated_gib") and row["peak_gib"] else ""
    )
    cells.append(" ".join(f"{loss:.3f}" for loss in row["losses"]))
    return f"| {' | '.join(cells)} |"


def write_document(results: Results, anchor: str, folder: Path) -> None:
    """Renews the table in `folder`/throughput.md, between its marks, and the plot beside it."""
    page = folder / "throughput.md"
    before, rest = page.read_text().split(BEGIN)
    written = "\n\n".join([comparison(results, anchor), table(results, anchor)])
    page.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{rest.split(END)[1]}")
    plot(results, anchor, folder / "throughput.svg")


def plot(results: Results, anchor: str, path: Path) -> None:
    """Bars: each row of the deepest model over the anchor of its run, short and long sequences apart."""
    from matplotlib import pyplot

    deepest = max(row["layers"] for row in results.values())
    rows = {
        row["row"]: (row, ratio)
        for row in results.values()
        if "failed" not in row and row["layers"] == deepest and (ratio := over_anchor(results, row, anchor)) is not None
    }
    by_length: dict[int, list[tuple[dict[str, Any], float]]] = {}
    for row, ratio in sorted(rows.values(), key=lambda pair: pair[1]):
        by_length.setdefault(row["sequence_length"], []).append((row, ratio))
    figure, panels = pyplot.subplots(
        len(by_length),
        1,
        figsize=(8, 1 + 0.35 * len(rows)),
        height_ratios=[len(by_length[length]) + 1 for length in sorted(by_length)],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (panel,), length in zip(panels, sorted(by_length), strict=True):
        shown = by_length[length]
        bars = panel.barh(
            [row["row"] for row, _ in shown],
            [ratio for _, ratio in shown],
            color=[_COLOURS[row["system"]] for row, _ in shown],
        )
        panel.bar_label(bars, [f"{row['tokens_per_second_per_device']:,.0f}" for row, _ in shown], padding=2)
        panel.margins(x=0.12)
        panel.set_title(f"{length:,} tokens", loc="left")
    panels[-1][0].set_xlabel(f"over '{anchor}' of the same run; at the bars, tokens/s/GPU")
    figure.savefig(path, metadata={"Date": None})
