"""Table, plot and page of `train_throughput.py`'s results: rows are compared within one run only."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from documents import markdown, renew
from row_process import Results

Row = dict[str, Any]
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
    """Markdown: our best row of each kind over the best of each peer, through the anchors of their runs; a row that
    several runs measured counts with the median of its ratios."""
    lines = []
    for rows in _anchored_alike(results):
        runs = ", ".join(dict.fromkeys(row["run"] for row in rows))
        lines += [(str(rows[0]["layers"]), *line, runs) for line in _contests(_best(results, rows))]
    return markdown(["layers", "ours, best", "theirs, best", "ours / theirs", "runs"], lines)


def _anchored_alike(results: Results) -> list[list[Row]]:
    """Rows that can be compared: those of one run, and of runs whose anchors have the same name and settings. Deepest
    models first, ranks alone last."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.values():
        if over_anchor(results, row) is not None:
            anchor = anchor_of(results, row)
            key = (-row.get("alone", 0), row["layers"], anchor["row"], *anchor["settings"])
            groups.setdefault(key, []).append(row)
    return [rows for _, rows in sorted(groups.items(), reverse=True)]


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
        gpu = next((f"{_whose(row)} {row['gpu']}, torch {row['torch']}, " for row in rows if "gpu" in row), "")
        parts.append(f"Run {run}: {gpu}{rows[0]['measured'][:10]}")
        parts.append(markdown(_COLUMNS, [_cells(results, row) for row in sorted(rows, key=lambda row: -row["layers"])]))
    return "\n\n".join(parts)


def _whose(row: Row) -> str:
    return f"one rank of {row['gpus']} on an" if row.get("alone") else f"{row['gpus']} x"


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
    renew(folder / "throughput.md", {MARK: tables(results)})
    plot(results, folder / "throughput.svg")


def plot(results: Results, path: Path) -> None:
    """Bars: each row of the deepest model over the anchor of its run. A panel holds one sequence length, and runs whose
    anchors are alike; of a row that several of them measured the median."""
    from matplotlib import pyplot

    drawn = panels(results)
    figure, axes = pyplot.subplots(
        len(drawn),
        1,
        figsize=(8, 1.2 + 0.35 * sum(len(bars) + 1 for bars in drawn.values())),
        height_ratios=[len(bars) + 1 for bars in drawn.values()],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (axis,), (title, bars) in zip(axes, drawn.items(), strict=True):
        names, ratios, systems = zip(*sorted(bars, key=lambda bar: bar[1]), strict=True)
        boxes = axis.barh(names, ratios, color=[_COLOURS[system] for system in systems])
        axis.bar_label(boxes, [f"{ratio:.3f}" for ratio in ratios], padding=2)
        axis.margins(x=0.12)
        axis.set_title(title, loc="left", fontsize="medium")
    axes[-1][0].set_xlabel("tokens/s/GPU over the first row of the same run")
    figure.savefig(path, metadata={"Date": None})


def panels(results: Results) -> dict[str, list[tuple[str, float, str]]]:
    """Title -> (row, median ratio, system)."""
    groups = _anchored_alike(results)
    found: dict[str, list[tuple[str, float, str]]] = {}
    for rows in groups:
        if rows[0]["layers"] < groups[0][0]["layers"] or rows[0].get("alone"):
            continue
        for length in sorted({row["sequence_length"] for row in rows}):
            of_length = [row for row in rows if row["sequence_length"] == length]
            runs = dict.fromkeys(row["run"] for row in of_length)
            title = f"{length:,} tokens, {rows[0]['layers']} layers, run{'s' * (len(runs) > 1)} {', '.join(runs)}"
            found[title] = [
                (name, _median_ratio(results, of_length, name), system)
                for name, system in {row["row"]: row["system"] for row in of_length}.items()
            ]
    return found


def _median_ratio(results: Results, rows: list[Row], name: str) -> float:
    ratios = [over_anchor(results, row) for row in rows if row["row"] == name]
    return statistics.median(ratio for ratio in ratios if ratio is not None)
