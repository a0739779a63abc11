"""Print the results under benchmarks/results as Markdown tables: mean and deviation over seeds.

    python benchmarks/summarise.py

Each folder there holds runs of examples/cifar10_cure.py that differ in method and seed alone; its
README.md names the command. Accuracies are percentages of the test images, of the last epoch.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent / "results"
METHODS = ("standard", "at", "trades", "cure")
COLUMNS = {"natural": "Natural", "pgd20": "PGD-20", "cw": "C&W", "nrr": "NRR (C&W)"}


def cell(values: list[float]) -> str:
    """Return mean ± sample standard deviation; one run has no deviation."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def summarise(folder: Path) -> str:
    """Return the table of one folder."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    first = runs[0]
    seeds = {run["settings"]["seed"] for run in runs}
    lines = [
        f"{first['data']}, {first['settings']['network']}, eps {first['eps_text']}, "
        f"beta {first['settings']['beta']:g}, {first['test_images']} test images, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}:",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for method in METHODS:
        rows = [run["results"]["last"] for run in runs if run["settings"]["method"] == method]
        if rows:
            cells = [cell([row[column] for row in rows]) for column in COLUMNS]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    folders = sorted({path.parent for path in RESULTS.glob("*/*.json")})
    print("\n\n".join(summarise(folder) for folder in folders))
