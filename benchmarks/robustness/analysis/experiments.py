"""Figures of the experiments: what the score ranks, the front of beta, training curves."""

from __future__ import annotations

from typing import Any

import numpy as np
import summary
from methods import METHODS

from .figure import COLOR, SHOWN, band, heading, interval

SCORES = {  # name and marker
    "rgp": ("RGP", "o"), "gradient": ("training gradient", "s"), "random": ("random", "D"),
    "matched": ("random, norm matched", "^"), "inverse": ("inverse RGP", "v"),
}  # fmt: skip
CURVES = {
    "none": ("all weights updated", "o"), "rgp": ("RGP, 0.7 updated", "D"),
    "cure": ("CURE: RGP, 0.7, and revision", "s"),
}  # fmt: skip


def draw_ranking(figure: Any, runs: summary.Runs) -> None:
    """Show accuracy against the fraction updated, a line for each score."""
    for axis, (column, title) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
        rows = summary.numbers(runs, "none", column)
        y, half = np.mean(rows), interval(rows)
        axis.axhspan(y - half, y + half, color=COLOR["none"], alpha=0.25, lw=0)
        axis.axhline(y, color=COLOR["none"], ls="--", label="all weights updated")
        for i, (score, (name, mark)) in enumerate(SCORES.items()):
            shares = [s for s in (0.1, 0.3, 0.5, 0.7) if f"{score}-{s}" in runs]
            found = [summary.numbers(runs, f"{score}-{s}", column) for s in shares]
            x = np.array(shares) + 0.006 * (i - 2)  # intervals side by side
            y, half = [np.mean(each) for each in found], [interval(each) for each in found]
            axis.errorbar(x, y, half, marker=mark, color=COLOR[score], label=name, capsize=2)
        axis.set(xlabel="fraction of the weights updated", ylabel=title, xticks=shares)
    finish(figure, axis, runs)


def draw_front(figure: Any, runs: summary.Runs) -> None:
    """Show natural against robust accuracy, by beta: all weights updated, and under masks."""
    axis = figure.subplots()
    shown = [n for n in runs if "beta" in n or n in ("none", "rgp-0.7", "cure")]
    seeds = set.intersection(*(set(runs[name]) for name in shown))
    runs = {name: {seed: runs[name][seed] for seed in seeds} for name in shown}
    fronts: dict[str, dict[float, Any]] = {}
    for name, of in runs.items():
        score, beta = name.split("-")[0], next(iter(of.values()))["options"]["beta"]
        rows = [summary.numbers(runs, name, column) for column in ("natural", "pgd20")]
        (x, y), half, color = np.mean(rows, axis=1), [interval(each) for each in rows], COLOR[score]
        axis.errorbar(x, y, half[1], half[0], color=color, lw=0.8, alpha=0.5, capsize=2)
        place = {"none": (-6, -13), "rgp": (6, 6), "cure": (-6, 6)}[score]
        how = {"ha": "right" if place[0] < 0 else "left", "color": color, "fontsize": 9}
        axis.annotate(f"{beta:g}", (x, y), place, textcoords="offset points", **how)
        fronts.setdefault(score, {})[beta] = x, y
    for score, front in fronts.items():
        line = np.transpose([front[beta] for beta in sorted(front)])
        label, marker = CURVES[score]
        axis.plot(*line, color=COLOR[score], marker=marker, label=label)
    axis.set(xlabel=f"{SHOWN['natural']}; at each point: β", ylabel=SHOWN["pgd20"])
    finish(figure, axis, runs)


def draw_curves(figure: Any, runs: summary.Runs) -> None:
    """Show loss and accuracy on the validation images after each epoch."""
    shown = {"loss": "training loss", "natural": SHOWN["natural"], "robust": "training attack, %"}
    for axis, (column, title) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for name, of in runs.items():
            rows = [[row[column] for row in run["history"]] for run in of.values()]
            color = COLOR[name if name in COLOR else name.split("-")[0]]
            x, label = range(1, len(rows[0]) + 1), METHODS[name].title
            band(axis, x, rows, color, "-", label=label)
        axis.set(xlabel="epoch; accuracy on validation images", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    finish(figure, axis, runs)


def finish(figure: Any, axis: Any, runs: summary.Runs) -> None:
    for each in figure.axes:
        each.grid(axis="y", alpha=0.25)
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(f"{heading(runs)}; mean and 95 % t-interval, unpaired", fontsize=10)


DRAWN = {"ranking": (draw_ranking, (10, 4.6)), "front": (draw_front, (8.6, 5.4))}
