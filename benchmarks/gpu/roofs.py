"""Upper bounds of a GPU for the operations that selection consists of.

    python benchmarks/gpu/roofs.py --csv roofs.csv
    python benchmarks/gpu/roofs.py --device cpu          # a rehearsal, in Triton's interpreter

    read        two arrays read, as the counting kernel does: 8 bytes a weight
    mask        two read, one of them written: 12 bytes a weight, the floor of any exact way
    copy        one read, one written, by torch

Medians of graph replays with a cold cache, interleaved. ``gb_per_s`` counts the bytes named above.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
import measure

BLOCK = 2048
CHUNK = 16 * BLOCK  # weights per program, as in the library


@triton.jit
def _score(a, b, sums, n, WRITE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    for block in range(0, CHUNK // BLOCK):
        at = program * CHUNK + block * BLOCK + i
        x = tl.load(a + at, mask=at < n, other=0.0)
        y = tl.load(b + at, mask=at < n, other=0.0)
        score = tl.abs(x) * 0.1 + tl.abs(y) * 0.9
        if WRITE:
            tl.store(b + at, tl.where(score > 0.5, y, 0.0), mask=at < n)
        else:
            most = tl.maximum(most, score)
    if not WRITE:
        tl.store(sums + program, tl.max(most))


def ways(n: int, device: torch.device) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return what is timed, on arrays of n weights, by name with its bytes per weight."""
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, generator=draw, device=device) for _ in range(2))
    sums = torch.empty(-(-n // CHUNK), device=device)
    size = dict(BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8)
    score = partial(_score[(len(sums),)], a, b, sums, n, **size)
    return {
        "read": (8, partial(score, WRITE=False)),
        "mask": (12, partial(score, WRITE=True)),
        "copy": (8, partial(b.copy_, a)),
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, "cuda")
    parser.add_argument("--weights", type=int, help="in each array (100 million)")
    parser.add_argument("--rounds", type=measure.positive, default=20)
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    on_gpu = device.type == "cuda"
    n = args.weights or (100_000_000 if on_gpu else 100_000)
    timed = ways(n, device)
    calls = {}
    for name, (_, call) in timed.items():
        call()
        calls[name] = measure.captured(call) if on_gpu else call
    flush: Tensor = torch.zeros(1 << (26 if on_gpu else 10), device=device)
    times = measure.interleaved(calls, args.rounds, device, dict.fromkeys(calls, flush.sum))
    rows = []
    for name, (size, _) in timed.items():
        row = {"benchmark": "roof", "model": "arrays", "weights": n, "dtype": "float32"}
        row |= {"provider": name, "floor_bytes": size * n, **measure.timing(times[name])}
        rows.append(row | {"gb_per_s": f"{size * n / float(row['p50_ms']) / 1e6:.4g}"})
    measure.show(f"{n:,} weights", rows, "copy")
    return measure.keep(args.csv, device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
