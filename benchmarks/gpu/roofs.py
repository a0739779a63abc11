"""What a GPU can do at most, of the kinds of work that selection is made of.

    python benchmarks/gpu/roofs.py --csv roofs.csv
    python benchmarks/gpu/roofs.py --device cpu          # a rehearsal, in Triton's interpreter

    read        two arrays read, as the counting kernel does: 8 bytes a weight
    mask        two read, one of them written: 12 bytes a weight, the floor of any exact way
    copy        one read, one written, by torch
    launch      an empty kernel, one of a hundred in a graph

Medians of graph replays with a cold cache, interleaved. ``gb_per_s`` counts the bytes named above.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
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
def _read(a, b, sums, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    for block in range(0, CHUNK // BLOCK):
        at = program * CHUNK + block * BLOCK + i
        x = tl.load(a + at, mask=at < n, other=0.0)
        y = tl.load(b + at, mask=at < n, other=0.0)
        most = tl.maximum(most, tl.abs(x) * 0.1 + tl.abs(y) * 0.9)
    tl.store(sums + program, tl.max(most))


@triton.jit
def _mask(a, b, n, threshold, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    for block in range(0, CHUNK // BLOCK):
        at = program * CHUNK + block * BLOCK + i
        x = tl.load(a + at, mask=at < n, other=0.0)
        y = tl.load(b + at, mask=at < n, other=0.0)
        keep = tl.abs(x) * 0.1 + tl.abs(y) * 0.9 > threshold
        tl.store(b + at, tl.where(keep, y, 0.0), mask=at < n)


@triton.jit
def _nothing(a):
    pass


def launch(kernel: Any, n: int, *arguments: Any) -> None:
    kernel[(-(-n // CHUNK),)](*arguments, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8)


class Roofs:
    """The ways, on arrays of n weights drawn at random."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.device = n, device
        draw = torch.Generator(device).manual_seed(0)
        self.a, self.b = (torch.randn(n, generator=draw, device=device) for _ in range(2))
        self.sums = torch.empty(-(-n // CHUNK), device=device)

    def read(self) -> None:
        launch(_read, self.n, self.a, self.b, self.sums, self.n)

    def mask(self) -> None:
        launch(_mask, self.n, self.a, self.b, self.n, 0.5)

    def copy(self) -> None:
        self.b.copy_(self.a)

    def launch(self) -> None:
        for _ in range(100):
            _nothing[(1,)](self.a, num_warps=4)

    def ways(self) -> dict[str, tuple[Callable[[], None], int]]:
        """Return what is timed, by name, with its bytes."""
        n = self.n
        return {
            "read": (self.read, 8 * n),
            "mask": (self.mask, 12 * n),
            "copy": (self.copy, 8 * n),
            "launch": (self.launch, 0),
        }


def captured(call: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Return the call as a CUDA graph's replay; on a CPU as it is."""
    for _ in range(2):
        call()
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, "cuda")
    parser.add_argument("--weights", type=int, help="in each array (100 million)")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    n = args.weights or (100_000_000 if device.type == "cuda" else 100_000)
    ways = Roofs(n, device).ways()
    calls = {name: captured(call, device) for name, (call, _) in ways.items()}
    flush: Tensor = torch.zeros(1 << (26 if device.type == "cuda" else 10), device=device)
    times = measure.interleaved(calls, args.rounds, device, flush.sum)
    where, rows, lines = measure.environment(device), [], []
    for name, (_, moved) in ways.items():
        p50 = measure.quantiles(times[name])[1]
        note = f"{1e6 * p50 / 100:.3g} us each" if name == "launch" else ""
        row = measure.timing(times[name]) | {
            "benchmark": "roof", "model": "arrays", "weights": n, "dtype": "float32",
            "provider": name, "floor_bytes": moved, "gb_per_s": f"{moved / p50 / 1e9:.4g}",
            "note": note,
        }  # fmt: skip
        rows.append(row)
        lines.append([name, row["p50_ms"], row["gb_per_s"], note])
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}, {n:,} weights\n")
    print(measure.table(["", "median ms", "GB/s", ""], lines))
    return measure.keep(args.csv, device, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
