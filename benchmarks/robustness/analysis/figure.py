"""How figures are saved, the figure of all methods, and that of the runs' courses."""

from __future__ import annotations

import statistics
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

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000")

Pair = tuple[float, float]


def save(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Draw a figure of ``size`` inches and write it as PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=size, dpi=120, layout="constrained")
        draw(figure)
        write_whole(path, lambda p: figure.savefig(p, format="png"))
        plt.close(figure)


def draw_scatter(figure: Any, runs: summary.Runs) -> None:
    """Show natural against robust accuracy: means (large, named), seeds (small), lines of NRR."""
    kinds = {
        "CURE": ("#D55E00", [name for name in runs if name == "cure"]),
        "other methods of the table": ("#0072B2", [n for n in runs if n in TABLE and n != "cure"]),
        "controls": ("#666666", [name for name in runs if name not in TABLE]),
    }
    axis = figure.subplots()
    seeds, means = [], {}
    for label, (color, names) in kinds.items():
        for name in names:
            x, y = (summary.numbers(runs, name, column) for column in ("natural", "pgd20"))
            seeds += zip(x, y, strict=True)
            means[METHODS[name].title] = statistics.mean(x), statistics.mean(y)
            axis.plot(x, y, "o", ms=3, color=color, alpha=0.35, mew=0)
            mean, top = means[METHODS[name].title], 3 if name == "cure" else 2
            axis.plot(*mean, "o", ms=8, color=color, mec="white", label=label, zorder=top)
            label = None  # once in the legend
    axis.margins(0.1)
    some = summary.some_run(runs)
    axis.set(xlabel="natural accuracy, %", ylabel="accuracy under PGD-20, %")
    axis.set_title(f"{some['data']}, {some['preset']['network']}, last epoch; small: single seeds")
    draw_nrr(axis)
    axis.legend(edgecolor="none", framealpha=1.0, loc="lower left", fontsize=9)
    figure.draw_without_rendering()  # positions are final
    place_labels(axis, means, seeds)


def draw_nrr(axis: Any) -> None:
    """Draw lines of equal natural-robust ratio, 2ab / (a + b), named at the right."""
    left, right, low, high = axis.axis()
    right = min(right, 100.2)
    corners = (2 * a * b / (a + b) for a, b in ((left, low), (right, high)))
    x = np.linspace(left, right, 200)
    for ratio in MaxNLocator(8).tick_values(*corners):
        y = ratio * x / (2 * x - ratio)
        axis.plot(x, y, color="#CCCCCC", lw=0.7, zorder=0)
        if low < y[-1] < high:
            axis.text(right, y[-1], f" NRR {ratio:g}", color="#666666", fontsize=8, va="center")
    axis.set(xlim=(left, right), ylim=(low, high))


def place_labels(axis: Any, points: dict[str, Pair], others: Sequence[Pair]) -> None:
    """Name points, each name as near as it fits without covering a point or another name."""
    to_pixels, frame = axis.transData, axis.get_window_extent()
    marks = [Bbox([at - 7, at + 7]) for at in to_pixels.transform(list(points.values()))]
    small = [Bbox([at - 3, at + 3]) for at in to_pixels.transform(others)]
    taken = [axis.get_legend().get_window_extent(), *marks, *small]
    for (name, xy), mark in zip(points.items(), marks, strict=True):
        label = axis.text(*xy, name, fontsize=8, ha="center", va="center", zorder=4)
        middle, box = to_pixels.transform(xy), label.get_window_extent().padded(1)
        apart = [other for other in marks if not other.overlaps(mark)]
        for turn in range(5000):  # along a spiral
            angle, far = 2.4 * turn, 8 + 0.1 * turn
            shift = (far + box.width / 2) * np.cos(angle), (far + box.height / 2) * np.sin(angle)
            moved = box.translated(*shift)
            line = Line([middle, np.clip(middle, moved.min, moved.max)])
            crossed = any(line.intersects_bbox(other, filled=False) for other in apart)
            inside = all(frame.contains(*corner) for corner in (moved.min, moved.max))
            if inside and not crossed and not any(map(moved.overlaps, taken)):
                break
        taken.append(moved)
        label.set_position(to_pixels.inverted().transform(middle + shift))
        if np.hypot(*np.diff(line.vertices, axis=0)[0]) > 14:
            ends = to_pixels.inverted().transform(line.vertices)
            axis.plot(*ends.T, color="#666666", lw=0.6)


def draw_curves(figure: Any, runs: dict[str, dict[str, Any]]) -> None:
    """Show loss and accuracy on the validation images after each epoch, a line for each method."""
    shown = {"loss": "training loss", "natural": "natural, %", "robust": "training attack, %"}
    axes = figure.subplots(1, len(shown))
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        for i, (name, run) in enumerate(runs.items()):
            values = [row[key] for row in run["history"]]
            how = {"color": COLORS[i % len(COLORS)], "ls": "-" if i < len(COLORS) else "--"}
            axis.plot(range(1, len(values) + 1), values, label=METHODS[name].title, **how)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    some = next(iter(runs.values()))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    title = f"{some['data']}, {some['preset']['network']}, seed {some['seed']}"
    figure.suptitle(f"{title}, {some['images']['val']} validation images", fontsize=10)
