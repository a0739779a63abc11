"""Time score, exact selection and masking of a model's gradients, against other methods.

    python benchmarks/speed/selection.py --device cpu               # ResNet-18, one thread
    python benchmarks/speed/selection.py --device cuda --models resnet18,wrn34-10,vit-b,1b
    python benchmarks/speed/selection.py --sizes              # one tensor of 1e3 to 1e7 weights

Timed is all from two lists of gradients to the masks, or, on a GPU, to the gradients set to 0 where
conserved; there the cache is cold. Providers are interleaved in one run.

    ours        this library
    topk        torch.topk of each tensor, its least value, comparison
    kthvalue    torch.kthvalue of each tensor, comparison
    percentile  np.percentile of each tensor on the CPU, comparison: the authors' way
    ...-graph   in a CUDA graph (the library sorts there); ...-compile: under torch.compile

The byte floor is what any exact way must move, at the speed of a copy on this device: both
gradients read once, and the masked one written, or the mask. `host.py` times the step around it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import measure
import numpy as np
import torch
from harness.networks import NETWORKS
from torch import Tensor

from rgp_optim import functional
from rgp_optim._reference import Entry

Shapes = list[tuple[int, ...]]
ALPHA = 0.1


# The models: shapes of the parameters in which weights are selected, two dimensions or more.


def shapes_of(network: str) -> Shapes:
    """Return the shapes of one of the examples' networks, for CIFAR-10."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in NETWORKS[network]().parameters() if p.dim() > 1]


def vit_b() -> Shapes:
    """ViT-B/16 for ImageNet, with its class token and position embedding."""
    block: Shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(768, 3, 16, 16), (1, 1, 768), (1, 197, 768), *block * 12, (1000, 768)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet18": lambda: shapes_of("resnet18"),
    "wrn34-10": lambda: shapes_of("wrn34-10"),
    "vit-b": vit_b,
    "1b": lambda: [(4096, 4096)] * 59 + [(1, 10144256)],
    "tiny": lambda: [(8, 3, 3, 3), (40, 30), (1, 1)],
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Case:
    """Gradients of a model, and the settings of a selection."""

    g_nats: list[Tensor]
    g_advs: list[Tensor]
    keep: float
    scope: str

    @property
    def on_gpu(self) -> bool:
        return self.g_advs[0].is_cuda

    def entries(self) -> list[Entry]:
        """Return what the library selects from."""
        pairs = enumerate(zip(self.g_nats, self.g_advs, strict=True))
        own = self.scope == "tensor"
        return [Entry(*pair, ALPHA, self.keep, i if own else 0) for i, pair in pairs]

    def scores(self) -> list[Tensor]:
        """Score plainly; one tensor of all under scope "global"."""
        pairs = zip(self.g_nats, self.g_advs, strict=True)
        found = [a.abs().float() * ALPHA + b.abs().float() * (1 - ALPHA) for a, b in pairs]
        return found if self.scope == "tensor" else [torch.cat([s.flatten() for s in found])]

    def above(self, least: Callable[[Tensor], Any]) -> list[Tensor]:
        """Select the scores that are not below a threshold; on a GPU apply the masks."""
        masks = [score >= least(score.flatten()) for score in self.scores()]
        if self.scope == "global":
            sizes = [g.numel() for g in self.g_advs]
            parts = zip(masks[0].split(sizes), self.g_advs, strict=True)
            masks = [part.view(g.shape) for part, g in parts]
        if self.on_gpu:
            for g, mask in zip(self.g_advs, masks, strict=True):
                g.mul_(mask)
        return masks


def heavy(shapes: Shapes, dtype: str, device: torch.device) -> list[list[Tensor]]:
    """Return two gradients of each shape, whose scale differs by row and column."""

    def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
        draw = torch.Generator(device).manual_seed(seed)
        options: dict[str, Any] = dict(generator=draw, device=device)
        g = torch.randn(shape, **options)
        g *= torch.randn((shape[0],) + (1,) * (len(shape) - 1), **options).exp()
        g *= torch.randn((1, shape[1]) + (1,) * (len(shape) - 2), **options).exp()
        return g.to(getattr(torch, dtype))

    return [[drawn(s, 2 * i + j) for i, s in enumerate(shapes)] for j in (0, 1)]


# The providers.


def library_masks(case: Case, backend: Any = "auto") -> list[Tensor]:
    how = dict(alpha=ALPHA, update_fraction=case.keep, scope=case.scope, backend=backend)
    return functional.rgp_topk_masks(case.g_nats, case.g_advs, **how)


def ours(case: Case) -> list[Tensor]:
    if not case.on_gpu:
        return library_masks(case)
    masks = functional.select(case.entries())
    functional.zero_and_save_([*zip(masks, case.g_advs, [None] * len(masks), strict=True)])
    return []


def rank(score: Tensor, keep: float) -> int:
    return max(1, round(keep * score.numel()))


def topk(case: Case) -> list[Tensor]:
    return case.above(lambda s: torch.topk(s, rank(s, case.keep), sorted=False).values.min())


def kthvalue(case: Case) -> list[Tensor]:
    return case.above(lambda s: s.kthvalue(s.numel() - rank(s, case.keep) + 1).values)


def percentile(case: Case) -> list[Tensor]:
    return case.above(lambda s: float(np.percentile(s.cpu().numpy(), 100 * (1 - case.keep))))


PROVIDERS = {p.__name__: p for p in (ours, topk, kthvalue, percentile)}
ON_GPU = ("ours-graph", "topk-graph", "topk-compile")


def make(name: str, case: Case) -> Callable[[], object]:
    """Return a provider for a case, warmed up."""
    plain, _, way = name.partition("-")
    function = PROVIDERS[plain]
    call = partial(torch.compile(function) if way == "compile" else function, case)
    for _ in range(3 if case.on_gpu else 1):
        call()
    return measure.captured(call) if way == "graph" else call


# The run.


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second, read and written, of a large copy."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    times = [measure.once(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * source.numel() * 4 / sorted(times)[4]


def check(case: Case) -> str:
    """Compare the masks with those of a stable sort."""
    if sum(g.numel() for g in case.g_advs) > 2e8:
        return "masks not compared: too large to sort"
    if not all(map(torch.equal, library_masks(case), library_masks(case, "torch"))):
        raise AssertionError("the masks are not those of a stable sort")
    return "masks equal to a stable sort's"


def run_case(
    model: str, shapes: Shapes, dtype: str, scope: str, keep: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time all providers on one case, and print the table."""
    device = torch.device(args.device)
    case = Case(*heavy(shapes, dtype, device), keep, scope)
    originals = [g.clone() for g in case.g_advs] if case.on_gpu else []
    flush = torch.zeros(1 << 26, device=device) if case.on_gpu else None

    def prepare() -> None:
        for g, original in zip(case.g_advs, originals):  # noqa: B905
            g.copy_(original)
        if flush is not None:
            flush.sum()  # read, so that no lines are left to be written back during the call

    note = check(case)
    calls = {}
    for name in args.providers:
        prepare()
        calls[name] = make(name, case)
    times = measure.interleaved(calls, args.rounds, device, dict.fromkeys(calls, prepare))
    weights, item = sum(map(math.prod, shapes)), case.g_advs[0].element_size()
    floor_bytes = weights * (3 * item if case.on_gpu else 2 * item + 1)
    floor_ms = floor_bytes / args.bandwidth * 1e3
    rows = []
    for name, call in calls.items():
        row = measure.timing(times[name])
        ms = float(row["p50_ms"])
        row |= {
            "benchmark": "size" if args.sizes else "select", "model": model, "weights": weights,
            "dtype": dtype, "scope": scope, "keep": keep, "provider": name,
            "floor_bytes": floor_bytes, "gb_per_s": f"{floor_bytes / ms / 1e6:.4g}",
            "floor_share": f"{floor_ms / ms:.3f}", "note": note if name == "ours" else "",
        }  # fmt: skip
        if case.on_gpu:
            prepare()
            row["peak_bytes"] = peak_bytes(call)
        rows.append(row)
    print(f"\n{model}: {weights:,} weights, {dtype}, byte floor {floor_ms:.3g} ms; {note}")
    measure.show(f"scope {scope}, keep {keep}", rows, "ours")
    return measure.keep(args.csv, device, rows)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the extra memory of one call on a GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def names_of(*known: str) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def fractions(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(0 < f < 1 for f in found):
        raise argparse.ArgumentTypeError(f"{text!r}: each should be between 0 and 1")
    return found


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser, ways = measure.parser(__doc__, "cpu"), [*PROVIDERS, *ON_GPU]
    add = parser.add_argument
    add("--models", type=names_of(*MODELS), default=["resnet18"])
    add("--dtypes", type=names_of(*DTYPES), default=["float32"])
    add("--scopes", type=names_of("tensor", "global"), default=["tensor"])
    add("--keep", type=fractions, default=[0.5, 0.1], help="fraction updated")
    add("--rounds", type=measure.positive, default=9)
    add("--providers", type=names_of(*ways), default=ways)
    add("--sizes", action="store_true", help="time one tensor of many sizes instead")
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    if device.type == "cpu":
        args.providers = [name for name in args.providers if name in PROVIDERS]
    args.bandwidth = copy_bandwidth(device)
    print(f"copies at {args.bandwidth / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    if args.sizes:
        # 1e3 to 1e7, three to a decade
        cases = [("one tensor", [(round(10 ** (1 + i / 3)), 100)]) for i in range(13)]
    else:
        cases = [(name, MODELS[name]()) for name in args.models]
    for (model, shapes), *how in product(cases, args.dtypes, args.scopes, args.keep):
        rows += run_case(model, shapes, *how, args)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
