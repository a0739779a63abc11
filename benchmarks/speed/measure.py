"""Shared by the benchmarks: interleaved timing, a record of the machine, one long CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "commit", "date", "device", "torch", "triton", "numpy", "python", "threads", "benchmark",
    "model", "weights", "dtype", "scope", "keep", "provider", "p20_ms", "p50_ms", "p80_ms",
    "repeats", "floor_bytes", "gb_per_s", "floor_share", "launches", "host_syncs", "host_ms",
    "peak_bytes", "note",
)  # fmt: skip
HEAD_START = 400_000  # cycles: about 0.2 ms, longer than the host takes for a few launches


def environment(device: torch.device) -> dict[str, str]:
    """Return the columns that describe a measurement: settings, machine, versions."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
    }


def commit() -> str:
    """Return the commit, with a + if the library has changed since."""
    changed = git("status", "--porcelain", "--", "rgp_optim", "benchmarks/*/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", file.read_text() if file.exists() else "", re.M)
    name = named[1].strip() if named else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def interleaved(
    providers: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    before: Mapping[str, Callable[[], object]] | None = None,
    head_start: int = HEAD_START,
) -> dict[str, list[float]]:
    """Time each provider once a round, one after another, so that all see the same machine.

    Returns seconds by name, one for each round; providers have been warmed up. What ``before`` has
    for a name is called first, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, provider in providers.items():
                if before and name in before:
                    before[name]()
                times[name].append(once(provider, device, head_start))
    finally:
        gc.enable()
    return times


def once(
    provider: Callable[[], object], device: torch.device, head_start: int = HEAD_START
) -> float:
    """Return the seconds of one call; on a GPU the GPU's, between two events of its stream.

    A GPU is kept busy for ``head_start`` cycles first, while the host launches: otherwise a short
    call would be as long as its launches take the host, which a training loop does not wait for.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        provider()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(head_start)
    first.record()
    provider()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a call, warmed up before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timing(times: Sequence[float]) -> dict[str, Any]:
    """Return the columns of seconds that were measured: 20th, 50th and 80th percentile."""
    names, found = ("p20_ms", "p50_ms", "p80_ms"), np.quantile(times, (0.2, 0.5, 0.8))
    row = {name: f"{1e3 * t:.4g}" for name, t in zip(names, found, strict=True)}
    return row | {"repeats": len(times)}


def parser(text: str | None, device: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all scripts have."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--device", choices=("cpu", "cuda"), default=device)
    found.add_argument("--csv", type=Path, help="append the rows to this file")
    return found


def positive(text: str) -> int:
    """Parse a number of rounds, steps, images."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("it should be at least 1")
    return int(text)


def device_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """Return the device that was asked for, and print what it is; a CPU gets one thread."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available here; --device cpu rehearses")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    where = environment(device)
    versions = ", ".join(f"{name} {where[name] or '-'}" for name in ("torch", "triton", "numpy"))
    print(f"{where['device']}, {where['threads'] or 'no'} CPU threads, {versions}")
    return device


def keep(path: Path | None, device: torch.device, rows: list[dict[str, Any]]) -> Any:
    """Append rows to a CSV at once, since a time limit may end the run; return them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh, where = not path.exists(), environment(device)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(where | row for row in rows)
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]], base: str) -> None:
    """Print rows as a table, with each time as a multiple of the provider's named ``base``."""
    reference = next((float(r["p50_ms"]) for r in rows if r["provider"] == base), math.nan)
    lines = [(title, "median ms", "p20 - p80", f"against {base}", "ns/weight", "GB/s")]
    for row in rows:
        ms, spread = float(row["p50_ms"]), f"{row.get('p20_ms', '')} - {row.get('p80_ms', '')}"
        per_weight = f"{ms * 1e6 / row['weights']:.3g}"
        ratio, rate = f"{ms / reference:.3g} x", row.get("gb_per_s", "")
        lines.append((row["provider"], row["p50_ms"], spread, ratio, per_weight, rate))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
