"""Tables and a figure of the speed benchmarks from their CSV, and from nothing else.

    python benchmarks/speed/plot.py benchmarks/speed/results.csv --out benchmarks/speed
    python benchmarks/speed/plot.py benchmarks/speed/results.csv --table

``size-DEVICE.png``: time of each way to select against the number of weights. With `--table` it
prints the times on whole models and of training steps as Markdown instead.
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
SETTINGS = ("model", "dtype", "scope", "keep")
PROVIDERS = {
    "ours": "this library",
    "ours-graph": "this library, CUDA graph",
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
# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#009E73")


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
    """Format a time."""
    if ms < 0.1:
        return f"{ms * 1e3:.3g} µs"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def about(rows: Sequence[Row]) -> str:
    """Return the machine and versions of rows, for a caption."""
    last = rows[-1]
    least = min(int(row["repeats"]) for row in rows)
    threads = f", {last['threads']} thread(s)" if last["threads"] else ""
    return (
        f"{last['device']}{threads}; torch {last['torch']}; commit {last['commit']}, "
        f"{last['date']}.\nMedians of at least {least} interleaved runs."
    )


def markdown(rows: Sequence[Row], first: str) -> str:
    """Return a table: settings by row, providers by column."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [[first, "dtype", "update", *(PROVIDERS[p] for p in providers)]]
    lines.append(["---"] * len(lines[0]))
    for (model, dtype, scope, keep), some in grouped(rows, *SETTINGS).items():
        found = {row["provider"]: label(float(row["p50_ms"])) for row in some}
        share = f"{keep} of each tensor" if scope == "tensor" else f"{keep} of all"
        lines.append([model, dtype, share, *(found.get(p, "") for p in providers)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def floor(row: Row) -> float:
    """Return the milliseconds of the byte floor."""
    return float(row["floor_share"]) * float(row["p50_ms"])


def size(rows: Sequence[Row], out: Path) -> None:
    """Draw time against the number of weights of one tensor."""
    keeps = sorted(grouped(rows, "keep").items(), reverse=True)
    figure, axes = plt.subplots(
        1, len(keeps), figsize=(5 * len(keeps), 4.4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ((keep,), panel), ax in zip(keeps, axes[0], strict=True):
        floors: tuple[list[int], list[float]] = [], []
        ways = grouped(panel, "provider").items()
        for ((provider,), mine), colour in zip(ways, COLOURS, strict=False):
            mine.sort(key=lambda row: int(row["weights"]))
            weights = [int(row["weights"]) for row in mine]
            times = [float(row["p50_ms"]) for row in mine]
            how = dict(marker="o", markersize=3, color=colour, label=PROVIDERS[provider])
            ax.plot(weights, times, **how)
            if provider == "ours":
                floors = weights, [floor(row) for row in mine]
        ax.plot(*floors, color="#000000", linestyle=":", label="byte floor")
        ax.set(xscale="log", yscale="log", xlabel="weights of the tensor")
        ax.set_title(f"update {keep}", loc="left", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[0, 0].legend(fontsize=8)
    title = f"Score, exact selection and mask of one tensor\n{about(rows)}"
    figure.suptitle(title, fontsize=7.5, x=0.01, ha="left")
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
    for (benchmark, device), rows in groups.items():
        if benchmark == "size":
            short = re.sub(r"\W+", "-", device.split("(")[0].strip()).lower()
            size(rows, args.out / f"size-{short}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
