"""What figures share, saving them, and the figure of all methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import summary
from harness.report import write_whole
from methods import METHODS, TABLE
from summary import heading, interval

# The same in every figure; methods that are drawn together are the furthest apart.
COLOR = {
    "at": "#000000", "trades": "#0072B2", "mart": "#66A61E", "fat": "#A6761D", "st-at": "#E7298A",
    "act": "#7570B3", "ard": "#88AA99", "iad": "#332288", "las-at": "#AA4499", "cure": "#D55E00",
    "at-pre": "#777777", "trades-pre": "#56B4E9", "trades-pre-revision": "#004488",
    "cure-no-revision": "#E69F00", "cure-random": "#882255", "random-no-revision": "#CC79A7",
    "cure-gradients": "#BBAA33", "cure-update": "#997700", "cure-global": "#009E73",
    "cure-signed": "#EE6677", "cure-loss": "#117733", "released-rgp": "#661100",
    "released-rgp-soft": "#AA6655", "trades-pre-slow": "#88CCEE", "cure-slow": "#FFAA88",
    "trades-pre-revision-0.3": "#6699CC", "cure-revision-0.3": "#EEBB66",
    "cure-random-revision-0.3": "#BB6688", "shuffled-0.7": "#666699",
    "none": "#56B4E9", "rgp": "#E69F00", "random": "#CC79A7", "gradient": "#009E73",
    "matched": "#8E6BBF", "inverse": "#8C510A", "shuffled-0.3": "#9999CC",
}  # fmt: skip

SHOWN = {"pgd20": "accuracy under PGD-20, %", "natural": "natural accuracy, %"}

Pair = tuple[float, float]


def save(path: Path, draw: Callable[[Any], None], size: Pair, title: str = "") -> None:
    """Draw a figure of ``size`` inches and write it, as a PNG and as an SVG beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=size, dpi=120, layout="constrained")
        figure.suptitle(title, fontsize=10)
        draw(figure)
        for file in (path, path.with_suffix(".svg")):
            write_whole(file, lambda p, kind=file.suffix[1:]: figure.savefig(p, format=kind))
        plt.close(figure)


def band(axis: Any, x: Any, rows: Any, color: str, line: str = "o-", **how: Any) -> None:
    """Draw the mean of a row for each seed and, if there are several, its interval."""
    y = np.mean(rows, axis=0)
    axis.plot(x, y, line, ms=3, color=color, **how)
    if len(rows) > 1:
        half, limits = interval(rows), axis.dataLim.frozen()
        axis.fill_between(x, y - half, y + half, color=color, alpha=0.12, lw=0)
        axis.dataLim.set(limits)  # of the lines


def draw_rows(figure: Any, rows: dict[str, tuple[str, str, dict[str, list[float]]]]) -> None:
    """Show means with intervals, and seeds below, of rows of a color, a marker and accuracies."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (column, title) in zip(axes, SHOWN.items(), strict=True):
        for y, (color, marker, found) in enumerate(rows.values()):
            values = found[column]
            half = interval(values) if len(values) > 1 else 0.0
            axis.plot(values, [y + 0.3] * len(values), "o", ms=3, color=color, alpha=0.6, mew=0)
            axis.errorbar(np.mean(values), y, 0, half, marker, color=color, capsize=2)
        axis.set(xlabel=title)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes[0].invert_yaxis()
    figure.supxlabel("below each mean: its seeds; bars: 95 % t-interval", fontsize=9)


def draw_methods(figure: Any, runs: summary.Runs) -> None:
    """Show the accuracies of each method; diamonds are controls."""
    rows = {}
    for name in runs:
        found = {column: summary.numbers(runs, name, column) for column in SHOWN}
        rows[METHODS[name].title] = COLOR[name], "o" if name in TABLE else "D", found
    draw_rows(figure, rows)
    figure.suptitle(f"{heading(runs)}, last epoch; diamonds: controls", fontsize=11)
