"""Time each kernel alone, also with other block sizes and warps.

    python benchmarks/gpu/kernels.py --models resnet18,vit-b --dtypes float32,bfloat16
    python benchmarks/gpu/kernels.py --variants all       # the same with other sizes
    python benchmarks/gpu/kernels.py --models tiny --device cpu     # a rehearsal

Medians of the profiler's times, with a cold cache. Each variant is compiled and measured in its own
process, after a comparison of its masks with a stable sort's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
import measure
import selection

from rgp_optim import _triton, functional

KERNELS = ("_count", "_mask", "_merge")  # `_merge` zeroes and saves, then restores
# What a variant changes: a constant of the module, or an option of the compilation.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "blocks of 1024": {"BLOCK": 1024},
    "blocks of 4096": {"BLOCK": 4096},
    "chunks of 16384": {"CHUNK": 16384},
    "chunks of 65536": {"CHUNK": 65536},
    "4 warps": {"num_warps": 4},
    "16 warps": {"num_warps": 16},
    "blocks of 1024, 4 warps": {"BLOCK": 1024, "num_warps": 4},
    "three passes": {"DIGITS": (11, 11, 10)},
    "four passes of 8 bits": {"DIGITS": (8, 8, 8, 8)},
    "as it is again": {},
}


def apply(changes: dict[str, Any]) -> None:
    """Change constants and options before anything is compiled."""
    for name, value in changes.items():
        place = _triton.OPTIONS if name in _triton.OPTIONS else vars(_triton)
        assert name in place
        place[name] = value


def a_step(case: selection.Case) -> None:
    """Select, zero and save, restore."""
    masks = functional.select(case.entries(), backend="triton")
    rows = [*zip(masks, case.g_advs, case.g_nats, strict=True)]
    saved = functional.zero_and_save_(rows, backend="triton")
    rows = [*zip(masks, case.g_nats, saved, strict=True)]
    functional.restore_(rows, backend="triton")


def kernel_times(case: selection.Case, calls: int) -> dict[str, float]:
    """Return milliseconds per step of each kernel, summed over its launches; medians of calls."""
    originals = [g.clone() for g in case.g_advs]
    flush = torch.zeros(1 << 26, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in KERNELS}
    for _ in range(calls):
        for g, original in zip(case.g_advs, originals, strict=True):
            g.copy_(original)
        flush.sum()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            a_step(case)
            torch.cuda.synchronize()
        for name, times in found.items():
            events = [e for e in profiler.events() if e.name == name]
            on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
            times.append(sum(e.time_range.elapsed_us() for e in on_gpu) / 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one variant on all models, in this process."""
    apply(VARIANTS[args.only])
    rows = []
    for model, dtype in product(args.models, args.dtypes):
        shapes = selection.MODELS[model]()
        gradients = selection.heavy(shapes, dtype, torch.device(args.device))
        case = selection.Case(*gradients, args.keep, "tensor")
        note = selection.check(case)
        for _ in range(3 if case.on_gpu else 1):
            a_step(case)
        times = kernel_times(case, args.calls) if case.on_gpu else {}
        rows += [
            {
                "benchmark": "kernel", "model": model, "dtype": dtype, "scope": "tensor",
                "weights": sum(map(math.prod, shapes)), "keep": args.keep,
                "provider": f"{kernel}: {args.only}", "repeats": args.calls, "note": note,
                "p50_ms": f"{times.get(kernel, math.nan):.4g}",
            }
            for kernel in KERNELS
        ]  # fmt: skip
    return rows


def in_a_process(name: str, argv: Sequence[str]) -> list[dict[str, Any]]:
    """Measure one variant in its own process; report one that fails."""
    command = [sys.executable, __file__, *argv, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        print(f"{name}: FAILED: {why}", flush=True)
        return []
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, "cuda")
    add, names = parser.add_argument, selection.names_of
    add("--models", type=names(*selection.MODELS), default=["resnet18"])
    add("--dtypes", type=names(*selection.DTYPES), default=["float32"])
    add("--keep", type=float, default=0.5)
    add("--calls", type=measure.positive, default=30)
    add("--variants", type=names("all", *VARIANTS), default=["as it is"], help="all, or some")
    add("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    if args.only:
        print(json.dumps(measured(args)))
        return []
    rows = []
    for name in VARIANTS if args.variants == ["all"] else args.variants:
        found = measure.keep(args.csv, device, in_a_process(name, argv))
        rows += found
        for i in range(0, len(found), len(KERNELS)):
            part = found[i : i + len(KERNELS)]
            each = [float(row["p50_ms"]) * 1e3 for row in part]
            shown = "  ".join(f"{k} {t:8.1f}" for k, t in zip(KERNELS, each, strict=True))
            what = f"{part[0]['model']}, {part[0]['dtype']}"
            print(f"{name:<24} {what:<20} {shown}  sum {sum(each):8.1f} us", flush=True)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
