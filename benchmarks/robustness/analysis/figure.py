"""How figures are saved, the figure of the table, and that of the runs' courses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import summary
from methods import METHODS, TABLE
from report import write_whole

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000")


def save(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Draw a figure of ``size`` inches and write it as PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        write_whole(path, lambda p: figure.savefig(p, dpi=120, format="png"))
        plt.close(figure)


def draw_table(figure: Any, runs: summary.Runs) -> None:
    """Show each seed (small) and the mean (large) of every method, a panel for each column."""
    shown = ("natural", "pgd20", "aa", "nrr")
    names = [name for name in METHODS if name in runs]
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, column in zip(axes, shown, strict=True):
        for row, name in enumerate(names):
            values = summary.numbers(runs, name, column)
            color = COLORS[0] if name in TABLE else COLORS[1]
            axis.plot(values, [row] * len(values), "o", ms=4, color=color, alpha=0.4, mew=0)
            if values:
                axis.plot(sum(values) / len(values), row, "o", ms=8, color=color)
        axis.set_title(summary.COLUMNS[column], fontsize=10)
        axis.grid(alpha=0.25)
    starts = ("natural start" if METHODS[name].warm else "scratch" for name in names)
    labels = [f"{METHODS[n].title} ({s})" for n, s in zip(names, starts, strict=True)]
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].invert_yaxis()
    some = summary.some_run(runs)
    figure.supxlabel(f"accuracy, %; last epoch; {some['data']}, {some['preset']['network']}")


def draw_curves(figure: Any, runs: dict[str, dict[str, Any]]) -> None:
    """Show loss and accuracy on the validation images after each epoch, a line for each method."""
    shown = {"loss": "training loss", "natural": "natural, %", "robust": "training attack, %"}
    axes = figure.subplots(1, len(shown))
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        for i, (name, run) in enumerate(runs.items()):
            values = [row[key] for row in run["history"]]
            style = "-" if i < len(COLORS) else "--"
            color = COLORS[i % len(COLORS)]
            axis.plot(
                range(1, len(values) + 1), values, style, color=color, label=METHODS[name].title
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    some = next(iter(runs.values()))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    images = f"{some['images']['val']} validation images"
    figure.suptitle(
        f"{some['data']}, {some['preset']['network']}, seed {some['seed']}, {images}", fontsize=10
    )
