"""Profile the selection and a whole step on a GPU: which kernels take the time.

python benchmarks/gpu_profile.py --models resnet18,vit-b
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import bench_kernels
import torch
from torch.profiler import ProfilerActivity, profile


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = bench_kernels.names_of(list(bench_kernels.MODELS))
    parser.add_argument("--models", type=names, default=["resnet18"])
    parser.add_argument("--dtype", choices=tuple(bench_kernels.DTYPES), default="float32")
    parser.add_argument("--calls", type=int, default=20)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no GPU is available here")
    device, dtype = torch.device("cuda"), bench_kernels.DTYPES[args.dtype]
    for model in args.models:
        shapes = bench_kernels.MODELS[model]()
        pairs = [
            [bench_kernels.heavy(s, 2 * i + j, dtype, device) for i, s in enumerate(shapes)]
            for j in (0, 1)
        ]
        case = bench_kernels.Case(*pairs, alpha=0.1, keep=0.5, scope="tensor")
        for _ in range(3):
            bench_kernels.ours(case)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            for _ in range(args.calls):
                bench_kernels.ours(case)
            torch.cuda.synchronize()
        print(f"{model}, {args.dtype}, {args.calls} calls")
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=12))


if __name__ == "__main__":
    main(sys.argv[1:])
