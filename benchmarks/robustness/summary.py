"""The table of finished runs beside the published one, and whether one method is better."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from methods import METHODS, TABLE

COLUMNS = {"natural": "Natural", "pgd20": "PGD-20", "aa": "AA", "cw": "C&W", "nrr": "NRR (C&W)"}
PUBLISHED = Path(__file__).with_name("published.csv")  # CIFAR-10, 200 epochs

Runs = dict[str, dict[int, dict[str, Any]]]  # by method and seed


def read(folder: Path) -> Runs:
    """Return the finished runs of a folder."""
    runs: Runs = {}
    for file in sorted(folder.glob("*-seed*.json")):
        content = json.loads(file.read_text())
        runs.setdefault(content["method"], {})[content["seed"]] = content
    return {name: runs[name] for name in METHODS if name in runs}


def some_run(runs: Runs) -> dict[str, Any]:
    """Return one of the runs; what they share stands in each."""
    return next(iter(next(iter(runs.values())).values()))


def numbers(runs: Runs, method: str, column: str, which: str = "last") -> list[float]:
    """Return one number for each seed."""
    rows = (run["results"][which] for run in runs[method].values())
    return [row[column] for row in rows if column in row]


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, in percent."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(runs: Runs, network: str, which: str = "last") -> str:
    """Return Markdown: a row for each method, with the published result below its mean."""
    rows = [["", "start", *COLUMNS.values(), "seeds", "published: Nat / PGD-20 / AA / C&W / NRR"]]
    with PUBLISHED.open(newline="") as file:
        known = {row["method"]: row for row in csv.DictReader(file) if row["network"] == network}
    for method in runs:
        kind = METHODS[method]
        cells = [spread(numbers(runs, method, column, which)) for column in COLUMNS]
        found = [known[method][column] for column in COLUMNS] if method in known else []
        said = " / ".join(f"{float(v):.1f}" if v else "-" for v in found)
        start = "natural" if kind.warm else "scratch"
        title = kind.title if method in TABLE else f"*{kind.title}*"
        rows.append([title, start, *cells, str(len(runs[method])), said])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose head is the first row."""
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *lines])


def report(runs: Runs) -> str:
    """Return the tables and what they are made of."""
    if not runs:
        return "There are no finished runs."
    some = some_run(runs)
    p = some["preset"]
    published = p["network"] if p["network"] in ("resnet18", "wrn34-10") else "resnet18"
    eps = f"{p['eps'] * 255:g}/255" if p["data"] == "cifar10" else f"{p['eps']:g}"
    doubts = [
        f"{run['method']}, seed {seed}: {'; '.join(run['masking']['suspicions'])}"
        for each in runs.values()
        for seed, run in each.items()
        if run["masking"]["suspicions"]
    ]
    told = "; ".join(doubts) if doubts else "no run fails a test for masked gradients"
    return "\n\n".join(
        [
            f"{some['data']}, {p['network']}, eps {eps}, {p['epochs']} epochs, "
            f"{some['images']['test']} test images; accuracy in %, mean ± standard deviation over "
            f"seeds; AA: {some['auto_attack'] or 'not run'}. Controls in italics. Published: "
            f"CIFAR-10, {published}, 200 epochs.",
            "Last epoch:",
            table(runs, published),
            "Best epoch (PGD on validation images):",
            table(runs, published, "best"),
            f"Masked gradients: {told}.",
        ]
    )


def paired(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p-value of a sign-flip test of paired differences.

    Of all ways to give each seed's difference a sign: the share whose mean is at least as far from
    0. Exact; with n seeds never below 2 / 2^n, so three seeds cannot go below 0.25.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    seen = abs(math.fsum(differences))
    flips = list(product((1, -1), repeat=len(differences)))
    far = sum(
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= seen - 1e-9
        for signs in flips
    )
    return far / len(flips)


def comparison(runs: Runs, first: str, second: str) -> str:
    """Say by how much one method differs from another over the seeds that both have."""
    for name in (first, second):
        if name not in runs:
            return f"There is no finished run of {name}."
    seeds = sorted(set(runs[first]) & set(runs[second]))
    if not seeds:
        return f"{first} and {second} have no seed in common."
    lines = [f"{first} - {second}, last epoch, in points, seeds {', '.join(map(str, seeds))}"]
    for column, title in COLUMNS.items():
        pairs = [
            tuple(runs[m][seed]["results"]["last"].get(column) for m in (first, second))
            for seed in seeds
        ]
        if any(value is None for pair in pairs for value in pair):
            continue
        a, b = zip(*pairs, strict=True)
        differences = [x - y for x, y in pairs]
        each = ", ".join(f"{d:+.1f}" for d in differences)
        mean = statistics.mean(differences)
        lines.append(f"{title:<10} {mean:+6.2f}  ({each}); sign-flip p = {paired(a, b):.2f}")
    lines.append(f"With {len(seeds)} seeds p cannot be below {2 / 2 ** len(seeds):.2g}.")
    return "\n".join(lines)
