"""What the benchmarks share: interleaved timing, a record of where it ran, and one long CSV."""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "speed" / "results.csv"
COLUMNS = (
    "commit", "date", "device", "torch", "triton", "numpy", "python", "threads", "benchmark",
    "model", "weights", "dtype", "scope", "keep", "provider", "p20_ms", "p50_ms", "p80_ms",
    "repeats", "floor_bytes", "gb_per_s", "floor_share", "launches", "host_syncs", "host_ms",
    "peak_bytes", "note",
)  # fmt: skip
HEAD_START = 400_000  # cycles: about 0.2 ms, longer than the host takes for a few launches


def environment(device: torch.device) -> dict[str, str]:
    """Return the columns that say what was measured and on what."""
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
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
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
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time each provider once a round, one after another, so that all see the same machine.

    Returns seconds by name, one for each round; providers have been warmed up. On a GPU the time is
    the GPU's, between two events of its stream. ``prepare`` is called before each, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, provider in providers.items():
                prepare()
                times[name].append(once(provider, device))
    finally:
        if was_enabled:
            gc.enable()
    return times


def once(
    provider: Callable[[], object], device: torch.device, head_start: int = HEAD_START
) -> float:
    """Return the seconds of one call.

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


def host_seconds(provider: Callable[[], object], rounds: int = 20) -> float:
    """Return the median time that the host takes to launch a call on a GPU; it does not wait."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        provider()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return sorted(times)[rounds // 2]


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    ranked = torch.tensor(sorted(times), dtype=torch.float64)
    p20, p50, p80 = torch.quantile(ranked, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return float(p20), float(p50), float(p80)


def timing(times: Sequence[float]) -> dict[str, Any]:
    """Return the columns of seconds that were measured."""
    names = ("p20_ms", "p50_ms", "p80_ms")
    found = {n: f"{1e3 * t:.4g}" for n, t in zip(names, quantiles(times), strict=True)}
    return found | {"repeats": len(times)}


def shown(row: Mapping[str, Any], base: float | None) -> list[str]:
    """Return the cells of a printed table: provider, median, spread, ratio to ``base`` ms."""
    ratio = f"{float(row['p50_ms']) / base:.2f} x" if base else "-"
    return [row["provider"], row["p50_ms"], f"{row['p20_ms']} - {row['p80_ms']}", ratio]


def keep(path: Path | None, device: torch.device, rows: list[dict[str, Any]]) -> Any:
    """Append rows to a CSV at once, as a limit of time may come; return them."""
    if path is not None:
        where = environment(device)
        append_rows(path, [{**where, **row} for row in rows])
    return rows


def parser(text: str | None, device: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all scripts have."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--device", choices=("cpu", "cuda"), default=device)
    found.add_argument("--csv", type=Path, help="append the rows to this file")
    return found


def device_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """Return the device that was asked for; a CPU gets one thread."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available here; --device cpu rehearses")
    torch.set_num_threads(1)
    return torch.device(args.device)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to the CSV; it gets its header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows({column: row.get(column, "") for column in COLUMNS} for row in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def count_launches(call: Callable[[], object]) -> int:
    """Return the kernels that one call launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum("LaunchKernel" in event.name for event in profiler.events())


def count_syncs(call: Callable[[], object]) -> int:
    """Return how often one call makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
