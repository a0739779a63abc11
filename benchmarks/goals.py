"""Set what the project wants to reach beside what was measured.

    python benchmarks/goals.py            # Markdown, as in TUNING.md

Goals for a GPU are for one NVIDIA H200, gradients in a cold cache, half of each tensor updated, the
adversarial gradient masked in place, times those of a CUDA graph's replay. Of several rows the last
one counts. Where nothing was measured it says so.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import measure

Row = dict[str, str]
COLLECTIVES = measure.RESULTS.parent / "collectives.csv"


class Rows:
    """Rows of the speed benchmarks on one kind of device."""

    def __init__(self, rows: Sequence[Row], gpu: bool) -> None:
        self.rows = [row for row in rows if ("NVIDIA" in row["device"]) == gpu]

    def find(self, **wanted: str) -> Row | None:
        """Return the last row with these values that has a time."""
        for row in reversed(self.rows):
            if row["p50_ms"] and all(row[key] == value for key, value in wanted.items()):
                return row
        return None

    def select(self, model: str, provider: str, dtype: str = "float32") -> Row | None:
        return self.find(
            benchmark="select", model=model, provider=provider, dtype=dtype, scope="tensor",
            keep="0.5",
        )  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """One line: what, how much of it, and how it is read from the rows.

    Attributes:
        what: In words.
        limit: As text, with its unit.
        read: Returns the measured number, or None; the row is for device and commit.
        good: Tells whether a number reaches the goal.
        shown: How a number is written.
    """

    what: str
    limit: str
    read: Callable[[], tuple[float, Row] | None]
    good: Callable[[float], bool]
    shown: str

    def line(self) -> list[str]:
        found = self.read()
        if found is None:
            return [self.what, self.limit, "not measured", "", ""]
        value, row = found
        reached = "yes" if self.good(value) else "**no**"
        return [self.what, self.limit, self.shown.format(value), reached, place(row)]


def place(row: Row) -> str:
    return f"{row['device'].split(' (')[0]}, {row['commit']}"


def at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


def at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def ratio(slow: Row | None, fast: Row | None) -> tuple[float, Row] | None:
    if slow is None or fast is None:
        return None
    return float(slow["p50_ms"]) / float(fast["p50_ms"]), fast


def column(row: Row | None, name: str, scale: float = 1.0) -> tuple[float, Row] | None:
    return None if row is None or not row[name] else (float(row[name]) * scale, row)


def on_gpu(rows: Rows) -> list[Goal]:
    """Return the goals for a GPU."""
    goals: list[Goal] = []
    limits = {
        "float32": {"resnet18": 75, "wrn34-10": 265, "vit-b": 490, "1b": 5500},
        "bfloat16": {"resnet18": 55, "wrn34-10": 165, "vit-b": 300, "1b": 3400},
    }
    for dtype, models in limits.items():
        for model, limit in models.items():
            read = lambda m=model, d=dtype: column(rows.select(m, "ours-graph", d), "p50_ms", 1e3)  # noqa: E731
            goals.append(
                Goal(f"{model}, {dtype}", f"{limit} µs", read, at_most(limit), "{:.0f} µs")
            )
    small = lambda name: rows.select("resnet18", name)  # noqa: E731
    for name, limit in (("launches", 4), ("host_syncs", 0)):
        what = "launches, to select and mask" if name == "launches" else "waits of the host"
        goals.append(
            Goal(
                f"resnet18, {what}",
                str(limit),
                lambda n=name: column(small("ours"), n),  # type: ignore[misc]
                at_most(limit),
                "{:.0f}",
            )
        )
    against = [("resnet18", "topk", 50), ("resnet18", "topk-graph", 20)]
    against += [("resnet18", "kthvalue", 1000), ("resnet18", "percentile", 1500)]
    against += [(model, "topk-graph", 4.5) for model in ("wrn34-10", "vit-b", "1b")]
    for model, name, least in against:
        read = lambda m=model, n=name: ratio(rows.select(m, n), rows.select(m, "ours-graph"))  # noqa: E731
        goals.append(
            Goal(f"{model}, times faster than {name}", f"{least:g} x", read, at_least(least),
                 "{:.1f} x")
        )  # fmt: skip
    for model in ("wrn34-10", "vit-b"):

        def step(m: str = model) -> tuple[float, Row] | None:
            wanted = {"benchmark": "update", "model": m, "dtype": "float32"}
            return ratio(rows.find(**wanted, provider="ours"), rows.find(**wanted, provider="sgd"))

        goals.append(
            Goal(f"{model}, step of the optimizer against fused SGD's", "1.6 x", step,
                 at_most(1.6), "{:.2f} x")
        )  # fmt: skip
    for model, most in (("resnet18", 0.25), ("wrn34-10", 0.25), ("1b", 0.15)):

        def memory(m: str = model) -> tuple[float, Row] | None:
            row = rows.select(m, "ours")
            return column(row, "peak_bytes", 1 / int(row["weights"]) if row else 1.0)

        goals.append(
            Goal(f"{model}, memory besides the gradients", f"{most} B a weight", memory,
                 at_most(most), "{:.2f} B")
        )  # fmt: skip
    return goals


def on_cpu(rows: Rows) -> list[Goal]:
    """Return the goals for one thread of a CPU."""
    goals: list[Goal] = []
    for model in ("resnet18", "wrn34-10"):
        for name, least in (("percentile", 4.0), ("kthvalue", 4.5)):
            read = lambda m=model, n=name: ratio(rows.select(m, n), rows.select(m, "ours"))  # noqa: E731
            goals.append(
                Goal(f"CPU: {model}, times faster than {name}", f"{least:g} x", read,
                     at_least(least), "{:.1f} x")
            )  # fmt: skip

    def small() -> tuple[float, Row] | None:
        sizes = {row["weights"] for row in rows.rows if row["benchmark"] == "size"}
        found = []
        for size in (s for s in sizes if int(s) < 64_000):
            for keep in ("0.5", "0.1"):
                wanted = {"benchmark": "size", "weights": size, "keep": keep}
                pair = (rows.find(**wanted, provider=p) for p in ("kthvalue", "ours"))
                found.append(ratio(*pair))
        there = [each for each in found if each is not None]
        return min(there, key=lambda each: each[0]) if there else None

    what = "CPU: one tensor below 64,000 weights, times faster than kthvalue, the least"
    return [*goals, Goal(what, "1 x", small, at_least(1.0), "{:.2f} x")]


def between_processes(rows: Sequence[Row]) -> list[Goal]:
    """Return the goals for what a selection over shards sends."""
    chosen = [
        row
        for row in rows
        if (row["network"], row["wrapper"], row["method"]) == ("resnet18", "FSDP2", "cure")
        and row["purpose"] == "selection"
        and row["processes"] == max(r["processes"] for r in rows)
    ]

    def total(name: str, scale: float = 1.0) -> tuple[float, Row] | None:
        return (scale * sum(int(r[name]) for r in chosen), chosen[-1]) if chosen else None

    def nothing() -> None:
        return None

    return [
        Goal("FSDP2: collectives of a selection", "3", lambda: total("calls"), at_most(3),
             "{:.0f}"),
        Goal("FSDP2: what they send, resnet18", "5 MB", lambda: total("bytes", 1e-6), at_most(5),
             "{:.2f} MB"),
        Goal("FSDP2: time added within a machine of 8 GPUs", "100 µs", nothing, at_most(100), "{}"),
    ]  # fmt: skip


def read(path: Path) -> list[Row]:
    if not path.exists():
        sys.exit(f"error: there is no {path}: nothing was measured yet.")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(speed: Path = measure.RESULTS, collectives: Path = COLLECTIVES) -> str:
    """Return all goals as Markdown."""
    rows = read(speed)
    goals = [*on_gpu(Rows(rows, True)), *on_cpu(Rows(rows, False))]
    goals += between_processes(read(collectives))
    lines = [["goal", "limit", "measured", "reached", "on, at commit"], ["---"] * 5]
    lines += [goal.line() for goal in goals]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=measure.RESULTS, help="rows of the speed runs")
    args = parser.parse_args(argv)
    print(table(args.csv))


if __name__ == "__main__":
    main(sys.argv[1:])
