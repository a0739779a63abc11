"""Draw the figures of the speed benchmarks from their CSV, and from nothing else.

    python benchmarks/speed/plot.py benchmarks/speed/results.csv --out benchmarks/speed

``select-DEVICE.png``: time of each provider by model, with the byte floor as a line.
``size-DEVICE.png``: time against the number of weights. ``step-DEVICE.png``: a whole training step.
With `--table` it prints the numbers of the first and the last as Markdown instead.
Of rows that differ in commit, date or versions alone, the last one counts.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Row = dict[str, str]
KEY = ("device", "threads", "benchmark", "model", "weights", "dtype", "scope", "keep", "provider")
SETTINGS = ("model", "dtype", "scope", "keep")
# Names, and Okabe and Ito's colours, which the colour-blind can tell apart.
PROVIDERS = {
    "ours": ("this library", "#0072B2"),
    "ours-graph": ("this library, CUDA graph", "#56B4E9"),
    "topk": ("torch.topk", "#E69F00"),
    "topk-graph": ("torch.topk, CUDA graph", "#F0E442"),
    "topk-compile": ("torch.topk, compiled", "#009E73"),
    "kthvalue": ("torch.kthvalue", "#D55E00"),
    "percentile": ("np.percentile", "#CC79A7"),
    "cure": ("CURE", "#0072B2"),
    "cure-update": ("CURE without reviser", "#56B4E9"),
    "authors": ("CURE, authors' implementation", "#CC79A7"),
    "trades": ("TRADES", "#E69F00"),
    "standard": ("standard", "#999999"),
}


def read(path: Path) -> list[Row]:
    """Return the rows; later ones replace those that measured the same."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list({tuple(row[k] for k in KEY): row for row in rows}.values())


def grouped(rows: Sequence[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows by what they have in some columns."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[c] for c in columns), []).append(row)
    return found


def label(ms: float) -> str:
    """Return a time as people say it."""
    if ms < 0.1:
        return f"{ms * 1e3:.3g} µs"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def about(rows: Sequence[Row]) -> str:
    """Return where rows come from, for a caption."""
    last = rows[-1]
    least = min(int(row["repeats"]) for row in rows)
    threads = f", {last['threads']} thread(s)" if last["threads"] else ""
    return (
        f"{last['device']}{threads}; torch {last['torch']}; commit {last['commit']}, "
        f"{last['date']}.\nMedians of at least {least} interleaved runs; bars span 20 % to 80 %."
    )


def markdown(rows: Sequence[Row], first: str) -> str:
    """Return a table: settings by row, providers by column."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [[first, "dtype", "update", *(PROVIDERS[p][0] for p in providers)]]
    lines.append(["---"] * len(lines[0]))
    for (model, dtype, scope, keep), some in grouped(rows, *SETTINGS).items():
        found = {row["provider"]: label(float(row["p50_ms"])) for row in some}
        share = f"{keep} of each tensor" if scope == "tensor" else f"{keep} of all"
        lines.append([model, dtype, share, *(found.get(p, "") for p in providers)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def floor(row: Row) -> float:
    """Return the milliseconds of the byte floor."""
    return float(row["floor_share"]) * float(row["p50_ms"])


def draw_bars(axes: plt.Axes, rows: Sequence[Row], title: str) -> None:
    """Draw one bar for each row."""
    rows = sorted(rows, key=lambda row: float(row["p50_ms"]))
    low, times, high = ([float(r[c]) for r in rows] for c in ("p20_ms", "p50_ms", "p80_ms"))
    spread = np.subtract([times, high], [low, times])
    names, colours = zip(*(PROVIDERS[row["provider"]] for row in rows), strict=True)
    axes.barh(names, times, xerr=spread, color=colours, ecolor="#444444", height=0.6)
    reference = next((t for t, r in zip(times, rows, strict=True) if r["provider"] == "ours"), None)
    for i, t in enumerate(times):
        ratio = f"  ({t / reference:.1f} x)" if reference and t != reference else ""
        how = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.annotate(label(t) + ratio, (high[i], i), **how)
    axes.invert_yaxis()
    axes.set_xlim(0, max(high) * 1.3)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def select(rows: Sequence[Row], out: Path) -> None:
    """Draw score, selection and masking: a panel for each model and setting."""
    panels = grouped(rows, *SETTINGS)
    heights = [0.28 * len(p) + 1.0 for p in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, sum(heights) + 0.8), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for ((model, dtype, scope, keep), mine), ax in zip(panels.items(), axes[:, 0], strict=True):
        million = int(mine[0]["weights"]) / 1e6
        scope = "each tensor" if scope == "tensor" else "all together"
        title = f"{model}: {million:.1f} million {dtype}, update {keep} of {scope}"
        draw_bars(ax, mine, f"{title}; dotted: byte floor {label(floor(mine[0]))}")
        ax.axvline(floor(mine[0]), color="#000000", linestyle=":", linewidth=1)
    finish(figure, "Score, exact selection and mask", rows, out)


def size(rows: Sequence[Row], out: Path) -> None:
    """Draw time against the number of weights of one tensor."""
    keeps = sorted(grouped(rows, "keep").items(), reverse=True)
    figure, axes = plt.subplots(
        1, len(keeps), figsize=(5 * len(keeps), 4.4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ((keep,), panel), ax in zip(keeps, axes[0], strict=True):
        floors: tuple[list[int], list[float]] = [], []
        for (provider,), mine in grouped(panel, "provider").items():
            mine.sort(key=lambda row: int(row["weights"]))
            weights = [int(row["weights"]) for row in mine]
            name, colour = PROVIDERS[provider]
            times = [float(row["p50_ms"]) for row in mine]
            ax.plot(weights, times, marker="o", markersize=3, color=colour, label=name)
            if provider == "ours":
                floors = weights, [floor(row) for row in mine]
        ax.plot(*floors, color="#000000", linestyle=":", label="byte floor")
        ax.set(xscale="log", yscale="log", xlabel="weights of the tensor")
        ax.set_title(f"update {keep}", loc="left", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[0, 0].legend(fontsize=8)
    finish(figure, "Score, exact selection and mask of one tensor", rows, out)


def step(rows: Sequence[Row], out: Path) -> None:
    """Draw a whole training step."""
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.8), layout="constrained")
    first = rows[0]
    draw_bars(axes, rows, f"{first['model']}, {first['dtype']}, {first['note']}")
    finish(figure, "One training step", rows, out)


def finish(figure: plt.Figure, title: str, rows: Sequence[Row], out: Path) -> None:
    figure.suptitle(f"{title}\n{about(rows)}", fontsize=7.5, x=0.01, ha="left")
    figure.savefig(out, dpi=130)
    plt.close(figure)
    print(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figures")
    parser.add_argument("--table", action="store_true", help="print Markdown tables instead")
    args = parser.parse_args(argv)
    if not args.csv.is_file():
        parser.error(f"{args.csv}: there is no such file; selection.py --csv writes it")
    groups = grouped(read(args.csv), "benchmark", "device")
    if args.table:
        headers = {"select": "score, selection, mask", "step": "a training step"}
        for (benchmark, _), rows in groups.items():
            if benchmark in headers:
                print(markdown(rows, headers[benchmark]) + "\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = {"select": select, "size": size, "step": step}
    for (benchmark, device), rows in groups.items():
        if benchmark in drawn:
            short = re.sub(r"\W+", "-", device.split("(")[0].strip()).lower()
            drawn[benchmark](rows, args.out / f"{benchmark}-{short}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
