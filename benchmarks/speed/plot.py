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

Row = dict[str, str]
KEY = ("device", "threads", "benchmark", "model", "weights", "dtype", "scope", "keep", "provider")
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "ours": "#0072B2", "cure": "#0072B2", "ours-graph": "#56B4E9", "cure-update": "#56B4E9",
    "sort": "#999999", "standard": "#999999", "topk": "#E69F00",
    "trades": "#E69F00", "topk-graph": "#F0E442", "topk-compile": "#009E73",
    "kthvalue": "#D55E00", "percentile": "#CC79A7", "authors": "#CC79A7",
}  # fmt: skip
NAMES = {
    "ours": "this library",
    "ours-graph": "this library, CUDA graph",
    "sort": "stable sort",
    "topk": "torch.topk",
    "topk-graph": "torch.topk, CUDA graph",
    "topk-compile": "torch.topk, compiled",
    "kthvalue": "torch.kthvalue",
    "percentile": "np.percentile",
    "cure": "CURE",
    "cure-update": "CURE without reviser",
    "authors": "CURE, authors' implementation",
    "trades": "TRADES",
    "standard": "standard",
}


def read(path: Path) -> list[Row]:
    """Return the rows; later ones replace those that measured the same."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list({tuple(row[k] for k in KEY): row for row in rows}.values())


def label(ms: float) -> str:
    """Return a time as people say it."""
    if ms < 0.1:
        return f"{ms * 1e3:.3g} µs"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def about(rows: Sequence[Row]) -> str:
    """Return where rows come from, for a caption."""
    first = rows[-1]
    least = min(int(row["repeats"]) for row in rows)
    threads = f", {first['threads']} thread(s)" if first["threads"] else ""
    return (
        f"{first['device']}{threads}; torch {first['torch']}; commit {first['commit']}, "
        f"{first['date']}.\nMedians of at least {least} interleaved runs; bars span 20 % to 80 %."
    )


def markdown(rows: Sequence[Row], first: str) -> str:
    """Return a table: settings by row, providers by column."""
    settings = ("model", "dtype", "scope", "keep")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    times: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        found = times.setdefault(tuple(row[c] for c in settings), {})
        found[row["provider"]] = label(float(row["p50_ms"]))
    lines = [[first, "dtype", "update", *(NAMES.get(p, p) for p in providers)]]
    lines.append(["---"] * len(lines[0]))
    for (model, dtype, scope, keep), found in times.items():
        share = f"{keep} of each tensor" if scope == "tensor" else f"{keep} of all"
        lines.append([model, dtype, share, *(found.get(p, "") for p in providers)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_bars(axes: plt.Axes, rows: Sequence[Row], title: str) -> None:
    """Draw one bar for each row."""
    rows = sorted(rows, key=lambda row: float(row["p50_ms"]))
    times = [float(row["p50_ms"]) for row in rows]
    spread = [
        [t - float(row["p20_ms"]) for t, row in zip(times, rows, strict=True)],
        [float(row["p80_ms"]) - t for t, row in zip(times, rows, strict=True)],
    ]
    names = [NAMES.get(row["provider"], row["provider"]) for row in rows]
    colours = [COLOURS.get(row["provider"], "#000000") for row in rows]
    axes.barh(names, times, xerr=spread, color=colours, ecolor="#444444", height=0.6)
    reference = next((t for t, r in zip(times, rows, strict=True) if r["provider"] == "ours"), None)
    for i, t in enumerate(times):
        ratio = f"  ({t / reference:.1f} x)" if reference and t != reference else ""
        axes.annotate(
            label(t) + ratio, (float(rows[i]["p80_ms"]), i), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(0, max(float(row["p80_ms"]) for row in rows) * 1.3)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def select(rows: Sequence[Row], out: Path) -> None:
    """Draw score, selection and masking: a panel for each model and setting."""
    settings = ("model", "dtype", "scope", "keep")
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row[c] for c in settings), []).append(row)
    height = sum(0.28 * len(p) + 1.0 for p in panels.values())
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, height + 0.8), squeeze=False, layout="constrained",
        height_ratios=[0.28 * len(p) + 1.0 for p in panels.values()],
    )  # fmt: skip
    for (setting, mine), ax in zip(panels.items(), axes[:, 0], strict=True):
        model, dtype, scope, keep = setting
        million = int(mine[0]["weights"]) / 1e6
        scope = "each tensor" if scope == "tensor" else "all together"
        title = f"{model}: {million:.1f} million {dtype}, update {keep} of {scope}"
        draw_bars(ax, mine, title)
        shares = [float(r["floor_share"]) * float(r["p50_ms"]) for r in mine if r["floor_share"]]
        if shares:
            ax.axvline(shares[0], color="#000000", linestyle=":", linewidth=1)
            ax.set_title(f"{title}; dotted: byte floor {label(shares[0])}", loc="left", fontsize=10)
    finish(figure, "Score, exact selection and mask", rows, out)


def size(rows: Sequence[Row], out: Path) -> None:
    """Draw time against the number of weights of one tensor."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(
        1, len(keeps), figsize=(5 * len(keeps), 4.4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for keep, ax in zip(keeps, axes[0], strict=True):
        for provider in dict.fromkeys(row["provider"] for row in rows):
            mine = [r for r in rows if (r["keep"], r["provider"]) == (keep, provider)]
            mine.sort(key=lambda row: int(row["weights"]))
            ax.plot(
                [int(r["weights"]) for r in mine], [float(r["p50_ms"]) for r in mine], marker="o",
                markersize=3, color=COLOURS.get(provider, "#000000"),
                label=NAMES.get(provider, provider),
            )  # fmt: skip
        floor = sorted({(int(r["weights"]), float(r["floor_share"]) * float(r["p50_ms"])) for r in
                        rows if r["keep"] == keep and r["provider"] == "ours"})  # fmt: skip
        ax.plot(*zip(*floor, strict=True), color="#000000", linestyle=":", label="byte floor")
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
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in read(args.csv):
        groups.setdefault((row["benchmark"], row["device"]), []).append(row)
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
