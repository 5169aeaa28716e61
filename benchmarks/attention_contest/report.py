"""Results as Markdown tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from attention_contest.results import (
    Entry,
    Results,
    finished,
    newest_shares,
    reached,
    row_key,
    runs_of,
    share_of_ideal,
    tflops,
)
from attention_contest.rows import ANCHOR, IDEAL, ONE_GPU, TORCH, Bar, Row, all_rows, bars, grid
from documents import markdown

COLUMNS = [
    "mode",
    "forward ms",
    "forward + backward ms",
    "TFLOP/s per GPU",
    "share of the ideal, forward",
    "share of the ideal",
    "exposed ms",
    "peak GiB",
    "error",
]


def entry_table(entry: Entry) -> str:
    """One row of one run: a line for each mode."""
    lines = [COLUMNS]
    for name in finished(entry):
        mode = entry["modes"][name]
        whole = name == ONE_GPU
        exposed = None if whole or mode["kernels"] is None else mode["exposed"]
        lines.append(
            [
                f"{name} (auto)" if name == entry.get("auto") else name,
                _number(mode["forward"]),
                _number(mode["forward_backward"]),
                f"{tflops(entry, name):.0f}",
                "" if whole or mode["forward"] is None else f"{share_of_ideal(entry, name, 'forward'):.1%}",
                "" if whole else f"{share_of_ideal(entry, name):.1%}",
                _number(exposed),
                _number(mode["peak_gib"], 2),
                f"{max(mode['errors'].values()):.1e}" if mode["errors"] else "",
            ]
        )
    failed = [f"- {name}: {mode['failed']}" for name, mode in entry["modes"].items() if "failed" in mode]
    return "\n".join([markdown(lines[0], lines[1:]), *(["", *failed] if failed else [])])


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def all_tables(results: Results) -> str:
    """Every row of every run, the bars' rows first."""
    keys = list(dict.fromkeys([(bar.row, bar.kernel) for bar in bars()]))
    for entries in results["rows"].values():
        entry = next(iter(entries.values()))
        keys.append((Row(**entry["row"]), entry["kernel"]))
    parts = [runs_table(results)]
    for row, kernel in dict.fromkeys(keys):
        for run, entry in runs_of(results, row, kernel):
            parts.append(f"## {row.name}, {kernel}\n\nRun {run}.\n\n{entry_table(entry)}")
    return "\n\n".join(parts) + "\n"


def runs_table(results: Results) -> str:
    """What each run ran on, and the anchor row's time on one GPU: how far clocks were apart."""
    lines = [["run", "on", "torch", f"one GPU, {ANCHOR.name} x 2, forward + backward ms"]]
    anchors = dict(runs_of(results, ANCHOR, "flash_attn_4"))
    for run, about in sorted(results["runs"].items()):
        single = anchors[run]["modes"].get(ONE_GPU, {}).get("forward_backward") if run in anchors else None
        on = f"{about['gpus']} x {about['gpu']}"
        lines.append([run, on, about["torch"], "" if single is None else f"{single:.2f}"])
    return markdown(lines[0], lines[1:])


def bars_table(results: Results) -> str:
    """Each bar in the newest run that measured it, and the range over all runs where there are several."""
    lines = [["work", "against", "at least", "aim", "reached", "over all runs (median)", "by", "auto takes"]]
    for bar in bars():
        found = [(run, one) for run, entry in runs_of(results, bar.row, bar.kernel) if (one := reached(entry, bar))]
        work = f"{bar.row.name}, {bar.kernel}"
        if not found:
            lines.append([work, bar.rival, *_demands(bar), "not measured", "", "", ""])
            continue
        _, (ratio, ours, rival) = found[0]
        newest = results["rows"][row_key(bar.row, bar.kernel)][found[0][0]]
        ratios = [one[0] for _, one in found]
        spread = f"{_ratio(bar, min(ratios))} to {_ratio(bar, max(ratios))} ({_ratio(bar, median(ratios))})"
        verdict = "" if ratio >= bar.required else " (missed)"
        lines.append(
            [
                work,
                rival,
                *_demands(bar),
                f"{_ratio(bar, ratio)}{verdict}",
                spread if len(found) > 1 else "",
                ours,
                _auto(newest, bar),
            ]
        )
    return markdown(lines[0], lines[1:])


def _auto(entry: Entry, bar: Bar) -> str:
    found = reached(entry, bar, entry["auto"]) if entry.get("auto") else None
    return "" if found is None else f"{found[1]}: {_ratio(bar, found[0])}"


def _demands(bar: Bar) -> tuple[str, str]:
    if bar.required == 1:
        return "ahead", ""
    return _ratio(bar, bar.required), _ratio(bar, bar.aim)


def _ratio(bar: Bar, value: float) -> str:
    return f"{value:.1%}" if bar.rival == IDEAL else f"{value:.2f} x"


def grid_table(results: Results) -> str:
    """The grid in brief: our fastest mode and the fastest peer, each in the newest run that measured it."""
    lines = [["shape", "kernel", "our fastest mode", "share of the ideal", "fastest peer", "its share"]]
    for row in all_rows():
        for kernel in ("flash_attn_4", "flash_attn_2"):
            shares = newest_shares(results, row, kernel)
            if any(ours for _, ours in shares.values()):
                lines.append([row.name, kernel, *_best(shares, ours=True), *_best(shares, ours=False)])
    return markdown(lines[0], lines[1:])


def _best(shares: dict[str, tuple[float, bool]], ours: bool) -> tuple[str, str]:
    """Name and share."""
    of_one_side = {name: share for name, (share, is_ours) in shares.items() if is_ours == ours}
    if not of_one_side:
        return "", ""
    name = max(of_one_side, key=lambda name: of_one_side[name])
    return name, f"{of_one_side[name]:.1%}"


FAMILIES = ["CUDA graphs", "within heads", "heads", "exchange", "ring-flash-attn", "zigzag ring", TORCH, "yunchang"]
"""Lines of the plot: a mode belongs to the first of these that its name holds, and the fastest of a family is drawn."""


def plot(results: Results, path: Path) -> None:
    """Share of the ideal over tokens per rank, 32/8 heads, flash_attn_4, each mode in the newest run that measured it.

    Needs matplotlib (pip install 'ringzero[bench]').
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "the same figures give the same file"
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    masks: dict[str, dict[str, int]] = {
        "causal": {},
        "packed documents, seed 1": {"documents": 1},
        "window 4,096": {"window": 4096},
    }
    panels = {title: lines for title, mask in masks.items() if (lines := _lines(results, mask))}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for family, points in lines.items():
            style = "--" if family in (TORCH, "ring-flash-attn", "yunchang") else "-"
            colour = f"C{FAMILIES.index(family)}"
            axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=family)
        axis.set(title=f"{title}, 32/8 heads", xlabel="tokens per rank", ylim=(0, 1.05))
        axis.set_xscale("log", base=2)
        axis.axhline(1, color="grey", linewidth=0.5)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("forward + backward, share of the ideal")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _lines(results: Results, mask: dict[str, int]) -> dict[str, list[tuple[int, float]]]:
    """For each family its points (tokens per rank, share of the ideal)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for length in sorted({row.local_tokens for row in grid()}):
        best: dict[str, float] = {}
        for name, (share, _) in newest_shares(results, Row(32, 8, length, **mask), "flash_attn_4").items():
            family = next(family for family in FAMILIES if family in name)
            best[family] = max(share, best.get(family, 0))
        for family, share in best.items():
            lines.setdefault(family, []).append((length, share))
    return lines
