"""Table, plot and page of `train_throughput.py`'s results: rows are compared within one run only."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from documents import markdown, renewed

Row = dict[str, Any]
Results = dict[str, Row]
MARK = "train_throughput.py"
_COLOURS = {"ringzero": "tab:blue", "torchtitan": "tab:orange", "huggingface": "tab:green"}
_COLUMNS = ["row", "layers", "tokens/s/GPU", "over the first", "MFU, causal", "MFU, full", "peak GiB"]
_COLUMNS += ["estimate / peak", "loss of each step"]


def anchor_of(results: Results, row: Row) -> Row:
    """The first row of the same run and depth: what all of them are compared with."""
    return next(other for other in results.values() if other["run"] == row["run"] and other["layers"] == row["layers"])


def over_anchor(results: Results, row: Row) -> float | None:
    """A row's rate over its anchor's; None where either failed."""
    anchor, rate = anchor_of(results, row), "tokens_per_second_per_device"
    return None if "failed" in anchor or "failed" in row else row[rate] / anchor[rate]


def comparison(results: Results) -> str:
    """Markdown: our best row of each kind over the best of each peer, through the anchors of their runs.

    Runs whose anchor row has the same name and settings are taken together: a row that several of them measured counts
    with the median of its ratios.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.values():
        if over_anchor(results, row) is not None:
            anchor = anchor_of(results, row)
            groups.setdefault((row["layers"], anchor["row"], *anchor["settings"]), []).append(row)
    lines = []
    for (layers, *_), rows in sorted(groups.items(), reverse=True):
        runs = ", ".join(dict.fromkeys(row["run"] for row in rows))
        lines += [(str(layers), *line, runs) for line in _contests(_best(results, rows))]
    return markdown(["layers", "ours, best", "theirs, best", "ours / theirs", "runs"], lines)


_Kind = tuple[int, str, int, int]
"""Sequence length, system, ZeRO stage, tensor_parallel_size."""


def _best(results: Results, rows: list[Row]) -> dict[_Kind, tuple[float, str]]:
    """Of each kind the best ratio to an anchor, and whose it is."""
    ratios: dict[tuple[_Kind, str], list[float]] = {}
    for row in rows:
        kind = (row["sequence_length"], row["system"], row["zero_stage"], row["tensor_parallel_size"])
        ratio = over_anchor(results, row)
        assert ratio is not None
        ratios.setdefault((kind, row["row"]), []).append(ratio)
    best: dict[_Kind, tuple[float, str]] = {}
    for (kind, name), found in ratios.items():
        candidate = (statistics.median(found), name)
        best[kind] = max(candidate, best.get(kind, candidate))
    return best


def _contests(best: dict[_Kind, tuple[float, str]]) -> list[tuple[str, str, str]]:
    """(ours, theirs, ratio) for each kind of ours: against each peer, and tensor parallelism against ours without."""
    lines = []
    for (length, system, zero_stage, tensor_parallel), (ratio, name) in sorted(best.items()):
        if system != "ringzero":
            continue
        rivals = [
            max((found for kind, found in best.items() if kind[:2] == (length, peer)), default=None)
            for peer in ("torchtitan", "huggingface")
        ]
        if tensor_parallel > 1:
            rivals.append(best.get((length, system, zero_stage, 1)))
        lines += [(name, rival[1], f"{ratio / rival[0]:.3f}") for rival in rivals if rival is not None]
    return lines


def table(results: Results) -> str:
    """Markdown: one table for each run."""
    parts = []
    for run in dict.fromkeys(row["run"] for row in results.values()):
        rows = [row for row in results.values() if row["run"] == run]
        gpu = next((f"{row['gpus']} x {row['gpu']}, torch {row['torch']}, " for row in rows if "gpu" in row), "")
        parts.append(f"Run {run}: {gpu}{rows[0]['measured'][:10]}")
        parts.append(markdown(_COLUMNS, [_cells(results, row) for row in sorted(rows, key=lambda row: -row["layers"])]))
    return "\n\n".join(parts)


def _cells(results: Results, row: Row) -> list[str]:
    if "failed" in row:
        return [row["row"], str(row["layers"]), row["failed"].replace("|", " "), *[""] * (len(_COLUMNS) - 3)]
    ratio = over_anchor(results, row)
    cells = [row["row"], str(row["layers"]), f"{row['tokens_per_second_per_device']:,.0f}"]
    cells.append(f"{ratio:.3f}" if ratio is not None else "")
    cells += [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_causal", "mfu_full")]
    cells.append(f"{row['peak_gib']:.1f}")
    cells.append(
        f"{row['estimated_gib'] / row['peak_gib']:.2f}" if row.get("estimated_gib") and row["peak_gib"] else ""
    )
    return [*cells, " ".join(f"{loss:.3f}" for loss in row["losses"])]


def tables(results: Results) -> str:
    """Markdown: all that stands in throughput.md."""
    return f"{comparison(results)}\n\n{table(results)}"


def write_document(results: Results, folder: Path) -> None:
    """Renews the tables in `folder`/throughput.md and the plot beside it."""
    page = folder / "throughput.md"
    page.write_text(renewed(page.read_text(), {MARK: tables(results)}))
    plot(results, folder / "throughput.svg")


def plot(results: Results, path: Path) -> None:
    """Bars: each row of the deepest model over the anchor of its run, short and long sequences apart."""
    from matplotlib import pyplot

    anchored = [row for row in results.values() if over_anchor(results, row) is not None]
    deepest = max(row["layers"] for row in anchored)
    by_length: dict[int, dict[str, tuple[Row, float]]] = {}
    for row in anchored:
        ratio = over_anchor(results, row)
        if row["layers"] == deepest and ratio is not None:
            by_length.setdefault(row["sequence_length"], {})[row["row"]] = (row, ratio)
    lengths = sorted(by_length)
    figure, panels = pyplot.subplots(
        len(lengths),
        1,
        figsize=(8, 1.2 + 0.35 * sum(map(len, by_length.values()))),
        height_ratios=[len(by_length[length]) + 1 for length in lengths],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (panel,), length in zip(panels, lengths, strict=True):
        shown = sorted(by_length[length].values(), key=lambda pair: pair[1])
        bars = panel.barh(
            [row["row"] for row, _ in shown],
            [ratio for _, ratio in shown],
            color=[_COLOURS[row["system"]] for row, _ in shown],
        )
        panel.bar_label(bars, [f"{row['tokens_per_second_per_device']:,.0f}" for row, _ in shown], padding=2)
        panel.margins(x=0.12)
        panel.set_title(f"{length:,} tokens, {deepest} layers", loc="left")
    panels[-1][0].set_xlabel("over the first row of the same run; at the bars, tokens/s/GPU")
    figure.savefig(path, metadata={"Date": None})
