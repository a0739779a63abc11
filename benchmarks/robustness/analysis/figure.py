"""What figures share, saving them, and the figure of all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import summary
from harness.report import write_whole
from matplotlib.path import Path as Line
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
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


def scatter(axis: Any, pairs: Sequence[Pair], color: str, marker: str, top: int = 2) -> Pair:
    """Draw seeds (small) and their mean with intervals; return the mean."""
    x, y = mean = tuple(np.mean(pairs, axis=0).tolist())
    axis.plot(*zip(*pairs, strict=True), "o", ms=3, color=color, alpha=0.35, mew=0)
    axis.plot(x, y, marker, ms=8, color=color, mec="white", zorder=top)
    if len(pairs) > 1:
        wide, high = interval(pairs)
        axis.errorbar(x, y, high, wide, color=color, lw=0.8, alpha=0.3, zorder=1)
    return mean


def draw_scatter(figure: Any, runs: summary.Runs) -> None:
    """Show natural against robust accuracy: means with intervals, seeds (small), lines of NRR."""
    axis = figure.subplots()
    seeds, means = [], {}
    for name in runs:
        columns = (summary.numbers(runs, name, column) for column in ("natural", "pgd20"))
        pairs = list(zip(*columns, strict=True))
        marker, top = "o" if name in TABLE else "D", 3 if name == "cure" else 2
        means[METHODS[name].title] = scatter(axis, pairs, COLOR[name], marker, top)
        seeds += pairs
    axis.margins(0.1)
    axis.set(xlabel="natural accuracy, %", ylabel="accuracy under PGD-20, %")
    axis.set_title(f"{heading(runs)}, last epoch", fontsize=11)
    grey = {"color": "#666666", "mec": "white"}
    axis.plot([], [], "o", ms=8, label="method of the table", **grey)
    axis.plot([], [], "D", ms=8, label="control", **grey)
    axis.plot([], [], "o", ms=4, label="a seed", **grey)
    axis.plot([], [], lw=0.8, label="95 % t-interval of the mean", **grey)
    axis.plot([], [], color="#CCCCCC", lw=0.7, label="equal NRR (PGD-20), its value")
    draw_nrr(axis)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # positions are final
    place_labels(axis, means, seeds)


def draw_nrr(axis: Any) -> None:
    """Draw lines of equal natural-robust ratio under PGD-20, 2ab / (a + b)."""
    left, right, low, high = axis.axis()
    right = min(right, 100.2)
    corners = (2 * a * b / (a + b) for a, b in ((left, low), (right, high)))
    x = np.linspace(left, right, 200)
    for ratio in MaxNLocator(8).tick_values(*corners):
        y = ratio * x / (2 * x - ratio)
        axis.plot(x, y, color="#CCCCCC", lw=0.7, zorder=0)
        if low < y[-1] < high:
            axis.text(right, y[-1], f" {ratio:g}", color="#666666", fontsize=8, va="center")
    axis.set(xlim=(left, right), ylim=(low, high))


def place_labels(axis: Any, points: dict[str, Pair], others: Sequence[Pair]) -> None:
    """Name points, each name as near as it and the line to it fit without covering another."""
    to_pixels, frame = axis.transData, axis.get_window_extent()
    marks = [Bbox([at - 7, at + 7]) for at in to_pixels.transform(list(points.values()))]
    small = [Bbox([at - 3, at + 3]) for at in to_pixels.transform(others)]
    names: list[Bbox] = []
    lines: list[Line] = []
    for (name, xy), mark in zip(points.items(), marks, strict=True):
        label = axis.text(*xy, name, fontsize=8, ha="center", va="center", zorder=4)
        middle, box = to_pixels.transform(xy), label.get_window_extent().padded(1)
        apart = [*names, *(other for other in marks if not other.overlaps(mark))]
        for turn in range(5000):  # along a spiral
            angle, far = 2.4 * turn, 8 + 0.1 * turn
            shift = (far + box.width / 2) * np.cos(angle), (far + box.height / 2) * np.sin(angle)
            moved = box.translated(*shift)
            line = Line([middle, np.clip(middle, moved.min, moved.max)])
            inside = all(frame.contains(*corner) for corner in (moved.min, moved.max))
            if not inside or any(map(moved.overlaps, [*names, *marks, *small])):
                continue
            crossed = any(line.intersects_bbox(other, filled=False) for other in apart)
            if not crossed and not any(other.intersects_bbox(moved) for other in lines):
                break
        names.append(moved)
        lines.append(line)
        label.set_position(to_pixels.inverted().transform(middle + shift))
        if np.hypot(*np.diff(line.vertices, axis=0)[0]) > 14:
            ends = to_pixels.inverted().transform(line.vertices)
            axis.plot(*ends.T, color="#666666", lw=0.6)
