"""Time each kernel of the selection on a GPU, and try other sizes for them.

    python benchmarks/gpu_profile.py --models resnet18,vit-b --dtypes float32,bfloat16
    python benchmarks/gpu_profile.py --variants all      # the same with other sizes, in turns
    python benchmarks/gpu_profile.py --models tiny --device cpu     # a rehearsal

Times are those of the profiler, kernel by kernel, medians over calls that begin with a cold cache.
Each variant is compiled and measured in a process of its own; its masks are compared with those of
a stable sort first. "as it is" comes first and last, to show how far two runs of the same differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import bench_kernels
import measure
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rgp_optim import _kernels, _triton

KERNELS = ("_bracket", "_count", "_mask", "_resolve")
# What a variant changes: a constant of the module, or an option of a kernel's compilation.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bracket: 32 warps": {"_bracket.num_warps": 32},
    "bracket: 8 warps": {"_bracket.num_warps": 8},
    "bracket: sample of 8192": {"SAMPLE": 8192},
    "bracket: sample of 8192 by 8 warps": {"SAMPLE": 8192, "_bracket.num_warps": 8},
    "bracket: edges half as exact": {"EXACTNESS": 4},
    "count: 4 warps": {"_count.num_warps": 4},
    "count: no cap on registers": {"_count.maxnreg": None},
    "mask: 4 warps": {"_mask.num_warps": 4, "MASK_BLOCK": 512},
    "mask: cap of 64": {"_mask.maxnreg": 64},
    "mask: no cap on registers": {"_mask.maxnreg": None},
    "resolve: 32 warps": {"_resolve.num_warps": 32},
    "resolve: 8 warps": {"_resolve.num_warps": 8, "TURN": 4096},
    "chunks of 15 * 1024": {"BLOCK": 1024, "CHUNK": 15 * 1024},
    "chunks of 15 * 1024 by 4 warps": {
        "BLOCK": 1024, "CHUNK": 15 * 1024, "MASK_BLOCK": 512, "_count.num_warps": 4,
        "_mask.num_warps": 4,
    },
    "window of 3.5 deviations": {"HALF_WIDTH": 3.5},
    "window of 5.5 deviations": {"HALF_WIDTH": 5.5},
    "as it is again": {},
}  # fmt: skip


def apply(changes: dict[str, Any]) -> None:
    """Change constants and options before anything is compiled."""
    for name, value in changes.items():
        kernel, _, option = name.partition(".")
        if option and value is None:
            _kernels.OPTIONS[kernel].pop(option, None)
        elif option:
            _kernels.OPTIONS[kernel][option] = value
        elif hasattr(_kernels, name):
            setattr(_kernels, name, _kernels.tl.constexpr(value))
        else:
            assert hasattr(_triton, name), name
            setattr(_triton, name, value)


def kernel_times(case: bench_kernels.Case, originals: list[Tensor], calls: int) -> dict[str, float]:
    """Return the median milliseconds of each kernel of the selection."""
    flush = torch.zeros(1 << 26, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            for g, original in zip(case.g_advs, originals, strict=True):
                g.copy_(original)
            flush.sum()
            bench_kernels.ours(case)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name in KERNELS:
            found[event.name].append(event.time_range.elapsed_us() / 1e3)
    return {name: measure.quantiles(times)[1] for name, times in found.items()}


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one variant on all models, in this process."""
    apply(VARIANTS[args.only])
    device = torch.device(args.device)
    rows = []
    for model in args.models:
        for dtype in args.dtypes:
            pairs: list[list[Tensor]] = [
                [
                    bench_kernels.heavy(s, 2 * i + j, bench_kernels.DTYPES[dtype], device)
                    for i, s in enumerate(bench_kernels.MODELS[model]())
                ]
                for j in (0, 1)
            ]
            case = bench_kernels.Case(*pairs, alpha=0.1, keep=args.keep, scope="tensor")
            originals = [g.clone() for g in case.g_advs]
            note = bench_kernels.check(case)
            for _ in range(3 if case.on_gpu else 1):
                bench_kernels.ours(case)
            times = kernel_times(case, originals, args.calls) if case.on_gpu else {}
            weights = sum(g.numel() for g in case.g_advs)
            for kernel in KERNELS:
                rows.append({
                    "benchmark": "kernel", "model": model, "weights": weights, "dtype": dtype,
                    "scope": "tensor", "keep": args.keep, "provider": f"{kernel}: {args.only}",
                    "p50_ms": f"{times.get(kernel, float('nan')):.4g}", "repeats": args.calls,
                    "note": note,
                })  # fmt: skip
    return rows


def in_a_process(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one variant in a process of its own; a failure is a row, too."""
    command = [sys.executable, __file__, "--only", name, "--device", args.device]
    command += ["--models", ",".join(args.models), "--dtypes", ",".join(args.dtypes)]
    command += ["--keep", str(args.keep), "--calls", str(args.calls)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        print(f"{name}: FAILED: {why}", flush=True)
        note = f"failed: {why}"[:200]
        return [{"benchmark": "kernel", "provider": f"{k}: {name}", "note": note} for k in KERNELS]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = bench_kernels.names_of
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", type=names(list(bench_kernels.MODELS)), default=["resnet18"])
    parser.add_argument("--dtypes", type=names(list(bench_kernels.DTYPES)), default=["float32"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument(
        "--variants", type=names(["all", *VARIANTS]), default=["as it is"], help="all, or some"
    )
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available here; --device cpu --models tiny rehearses")
    if args.only:
        print(json.dumps(measured(args)))
        return []
    rows = []
    where = measure.environment(torch.device(args.device))
    for name in VARIANTS if args.variants == ["all"] else args.variants:
        found = in_a_process(name, args)
        rows += found
        if args.csv:  # at once: a limit of time may come
            measure.append_rows(args.csv, [{**where, **row} for row in found])
        for i in range(0, len(found), len(KERNELS)):
            part = found[i : i + len(KERNELS)]
            if "p50_ms" in part[0]:
                each = [float(row["p50_ms"]) * 1e3 for row in part]
                shown = "  ".join(f"{k} {t:8.1f}" for k, t in zip(KERNELS, each, strict=True))
                what = f"{part[0]['model']}, {part[0]['dtype']}"
                print(f"{name:<33} {what:<20} {shown}  sum {sum(each):8.1f} us", flush=True)
    if args.csv:
        print(f"\n{len(rows)} rows added to {args.csv}")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
