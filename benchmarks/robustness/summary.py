"""Tables of finished runs, with published numbers and paired differences."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from methods import METHODS, TABLE
from methods.cure import CONTROLS, FRONT, REVISION, SCORES

COLUMNS = {"natural": "Natural", "pgd20": "PGD-20", "aa": "AA", "cw": "C&W", "nrr": "NRR (C&W)"}
PUBLISHED = Path(__file__).with_name("published.csv")  # CIFAR-10, 200 epochs

Runs = dict[str, dict[int, dict[str, Any]]]  # by method and seed


def read(*folders: Path) -> Runs:
    """Read the finished runs in folders."""
    runs: Runs = {}
    for file in sorted(file for folder in folders for file in folder.glob("*-seed*.json")):
        content = json.loads(file.read_text())
        runs.setdefault(content["method"], {})[content["seed"]] = content
    return {name: runs[name] for name in METHODS if name in runs}


def some_run(runs: Runs) -> dict[str, Any]:
    """Return any one run, for the settings that all share."""
    return next(iter(next(iter(runs.values())).values()))


def heading(runs: Runs) -> str:
    """Return the data, the network, the radius, the seeds of runs, and their β if they share it."""
    some = some_run(runs)
    p, seeds = some["preset"], sorted({seed for each in runs.values() for seed in each})
    eps = f"{255 * p['eps']:g}/255" if p["data"] == "cifar10" else f"{p['eps']:g}"
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    every = [
        run.get("options", {}) for name in runs if name != "mart" for run in runs[name].values()
    ]
    betas = {options["beta"] for options in every if "beta" in options}
    shared = f", β = {betas.pop():g}" if len(betas) == 1 else ""
    return f"{some['data']}, {p['network']}, ε = {eps}{shared}, {which}"


def numbers(runs: Runs, method: str, column: str, which: str = "last") -> list[float]:
    """Return one number per seed."""
    rows = (run["results"][which] for run in runs[method].values())
    return [row[column] for row in rows if column in row]


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, in percent."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(runs: Runs, network: str, which: str = "last") -> str:
    """Return Markdown: a row for each method, the published result in the last column."""
    last = "published: Nat / PGD-20 / AA / C&W / NRR"
    rows = [["", "name", "start", *COLUMNS.values(), "seeds", last]]
    with PUBLISHED.open(newline="") as file:
        known = {row["method"]: row for row in csv.DictReader(file) if row["network"] == network}
    for method in runs:
        kind = METHODS[method]
        cells = [spread(numbers(runs, method, column, which)) for column in COLUMNS]
        found = [known[method][column] for column in COLUMNS] if method in known else []
        said = " / ".join(f"{float(v):.1f}" if v else "-" for v in found)
        start = "natural" if kind.warm else "scratch"
        title = kind.title if method in TABLE else f"*{kind.title}*"
        rows.append([title, method, start, *cells, str(len(runs[method])), said])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its header."""
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *lines])


def report(runs: Runs) -> str:
    """Return the tables and what they are made of."""
    if not runs:
        return "There are no finished runs."
    some = some_run(runs)
    p = some["preset"]
    published = p["network"] if p["network"] in ("resnet18", "wrn34-10") else "resnet18"
    every = [run for each in runs.values() for run in each.values()]
    rises = sorted({f"{100 * run['preset'].get('lr_warmup', 0):g}" for run in every})
    masked = [(run, "; ".join(run["masking"]["suspicions"])) for run in every]
    doubts = [f"{r['method']}, seed {r['seed']}: {why}" for r, why in masked if why]
    told = "; ".join(doubts) if doubts else "no run fails a test for masked gradients"
    return "\n\n".join(
        [
            f"{heading(runs)}, {p['epochs']} epochs, the learning rate rising over "
            f"{' or '.join(rises)} % of the steps, {some['images']['test']} test images; accuracy "
            f"in %, mean ± standard deviation over seeds; AA: {some['auto_attack'] or 'not run'}. "
            f"Controls in italics. Published: CIFAR-10, {published}, 200 epochs.",
            "Last epoch:",
            table(runs, published),
            "Best epoch (PGD on validation images):",
            table(runs, published, "best"),
            "Differences within a seed, mean ± 95 % t-interval over seeds; bold: 0 is outside:",
            intervals(runs),
            intervals(runs, "best"),
            declines(runs),
            collapses(runs),
            f"Masked gradients: {told}.",
        ]
    )


def interval(values: Any) -> Any:
    """Return half the width of the mean's 95 % t-interval over the first dimension."""
    from scipy import stats  # comes with scikit-learn

    n = len(values)
    return stats.t.ppf(0.975, n - 1) * np.std(values, axis=0, ddof=1) / n**0.5


def gap(values: Sequence[float]) -> str:
    """Return a mean difference and its 95 % t-interval, bold if 0 is outside."""
    if len(values) < 2:
        return "-"
    mean, half = statistics.mean(values), interval(values)
    mark = "**" if abs(mean) > half else ""
    return f"{mark}{mean:+.1f} ± {half:.1f}{mark}"


def intervals(runs: Runs, which: str = "last") -> str:
    """Return Markdown: paired differences of methods in the last or the best epoch."""
    columns = [key for key in COLUMNS if key in some_run(runs)["results"][which]]
    rows = [[f"{which} epoch, points", "seeds", *(COLUMNS[key] for key in columns)]]
    for first, second in (pair for pair in compared() if runs.keys() >= set(pair)):
        seeds = sorted(set(runs[first]) & set(runs[second]))
        pairs = [[runs[m][seed]["results"][which] for m in (first, second)] for seed in seeds]
        each = ([x[key] - y[key] for x, y in pairs if key in x and key in y] for key in columns)
        rows.append([f"{first} - {second}", str(len(seeds)), *map(gap, each)])
    return markdown(rows)


def declines(runs: Runs) -> str:
    """Return Markdown: what the best epoch on validation images has more than the last one."""
    rows = [["best - last epoch, points", "seeds", "Natural", "PGD-20", "PGD-20, minus cure's"]]
    lost = {
        name: {
            seed: [run["results"]["best"][c] - run["results"]["last"][c] for c in list(COLUMNS)[:2]]
            for seed, run in of.items()
        }
        for name, of in runs.items()
    }
    for name, of in lost.items():
        cure = lost.get("cure", {}) if name != "cure" else {}
        apart = [robust - cure[seed][1] for seed, (_, robust) in of.items() if seed in cure]
        rows.append([name, str(len(of)), *map(gap, zip(*of.values(), strict=True)), gap(apart)])
    return markdown(rows)


def compared() -> list[tuple[str, str]]:
    """Return the pairs of methods to compare."""
    masks = ("trades-pre", "cure-no-revision", "random-no-revision")
    masked = [masks, ("trades-pre-revision", "cure", "cure-random"), tuple(REVISION)]
    pairs = [("cure", "trades-pre"), ("cure", "at-pre")]
    pairs += [(name, "cure") for name in CONTROLS if not any(name in each for each in masked)]
    for none, rgp, random in masked:
        pairs += [(rgp, none), (random, none), (rgp, random)]
    pairs += [pair for revised in masked[1:] for pair in zip(revised, masks, strict=True)]
    pairs += zip(masked[2], masked[1], strict=True)
    pairs += [(f"{name}-slow", name) for name in ("trades-pre", "cure")] + [("cure", "trades")]
    pairs += [("trades-pre", "trades"), ("at-pre", "at"), *((name, "at") for name in TABLE[1:])]
    for share in (0.7, 0.5, 0.3, 0.1):
        rgp, gradient, random, matched, inverse = (f"{score}-{share}" for score in SCORES)
        pairs += [(rgp, other) for other in ("none", gradient, random, matched)]
        pairs += [(rgp, f"shuffled-{share}"), (random, inverse)]
    for name in (name for name in FRONT if name.startswith("none")):
        pairs += [(first, name) for first in ("rgp-0.7", "cure")]
        pairs += [(name.replace("none", kind), name) for kind in ("rgp", "cure")]
    pairs += [("cure-beta4.5", "none-beta2")]  # each with its best beta on validation images
    return list(dict.fromkeys(pairs))


def collapses(runs: Runs, few: float = 10.0) -> str:
    """Say which runs from natural weights lose accuracy in the first epoch and recover it."""
    said = []
    for name in (name for name in runs if METHODS[name].warm):
        courses = [[row["natural"] for row in run["history"]] for run in runs[name].values()]
        lost = [each[0] for each in courses if each[-1] - each[0] > few]
        said += [f"{name} ({len(lost)}: {min(lost):.0f} to {max(lost):.0f} %)"] if lost else []
    if not said:
        return f"No run from natural weights gets back {few:g} points lost in its first epoch."
    told = "Warning: natural validation accuracy after the first epoch is more than "
    return f"{told}{few:g} points below the last epoch's (seeds): {', '.join(said)}."
