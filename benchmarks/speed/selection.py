"""How long score, exact selection and masking of a model's gradients take, against other ways.

    python benchmarks/speed/selection.py --device cpu               # ResNet-18, one thread
    python benchmarks/speed/selection.py --device cuda --models resnet18,wrn34-10,vit-b,1b
    python benchmarks/speed/selection.py --sizes              # one tensor of 1e3 to 1e7 weights
    python benchmarks/speed/selection.py --update                   # the optimizer's step around it

Timed is all from two lists of gradients to the masks, or, on a GPU, to the gradients set to 0 where
conserved; there the cache is cold. Providers are interleaved in one run.

    ours        this library
    sort        its specification: a stable sort of each tensor
    topk        torch.topk of each tensor, its least value, comparison
    kthvalue    torch.kthvalue of each tensor, comparison
    percentile  np.percentile of each tensor on the CPU, comparison: the authors' way
    ...-graph   the same in a CUDA graph; ...-compile: under torch.compile

The byte floor is what any exact way must move, at the speed of a copy on this device: both
gradients read once, and the masked one written, or the mask. `--update` times the step of torch's
fused SGD plain, wrapped, and wrapped with conserve="gradients".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import measure
import numpy as np
import torch
from networks import NETWORKS
from torch import Tensor

from rgp_optim import RGPSelectiveOptimizer, functional

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Case:
    """Gradients of a model, and what is asked for."""

    g_nats: list[Tensor]
    g_advs: list[Tensor]
    alpha: float
    keep: float
    scope: str

    @classmethod
    def draw(
        cls, shapes: Shapes, dtype: str, keep: float, scope: str, device: torch.device
    ) -> Case:
        """Draw gradients at random."""
        gs = [
            [heavy(s, 2 * i + j, DTYPES[dtype], device) for i, s in enumerate(shapes)]
            for j in (0, 1)
        ]
        return cls(*gs, ALPHA, keep, scope)

    @property
    def on_gpu(self) -> bool:
        return self.g_advs[0].is_cuda

    def scores(self) -> list[Tensor]:
        """Score plainly; one tensor of all under scope "global"."""
        pairs = zip(self.g_nats, self.g_advs, strict=True)
        found = [
            a.abs().float() * self.alpha + b.abs().float() * (1 - self.alpha) for a, b in pairs
        ]
        return found if self.scope == "tensor" else [torch.cat([s.flatten() for s in found])]

    def above(self, least: Callable[[Tensor], Any]) -> list[Tensor]:
        """Select the scores that are not below a threshold, which is computed from them."""
        return self.finish([score >= least(score.flatten()) for score in self.scores()])

    def finish(self, masks: list[Tensor]) -> list[Tensor]:
        """Bring masks into the gradients' shapes; on a GPU apply them."""
        if self.scope == "global":
            sizes = [g.numel() for g in self.g_advs]
            parts = zip(masks[0].split(sizes), self.g_advs, strict=True)
            masks = [part.view(g.shape) for part, g in parts]
        if self.on_gpu:
            for g, mask in zip(self.g_advs, masks, strict=True):
                g.mul_(mask)
        return masks


def heavy(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return gradients whose scale differs by row and column."""
    draw = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = dict(generator=draw, device=device)
    g = torch.randn(shape, **options)
    g *= torch.randn((shape[0],) + (1,) * (len(shape) - 1), **options).exp()
    g *= torch.randn((1, shape[1]) + (1,) * (len(shape) - 2), **options).exp()
    return g.to(dtype)


# The providers.


def library_masks(case: Case, backend: Any = "auto") -> list[Tensor]:
    how = dict(alpha=case.alpha, update_fraction=case.keep, scope=case.scope, backend=backend)
    return functional.rgp_topk_masks(case.g_nats, case.g_advs, **how)


def ours(case: Case) -> list[Tensor]:
    count = len(case.g_advs)
    if not case.on_gpu:
        return library_masks(case)
    pools = [0] * count if case.scope == "global" else list(range(count))
    masks = functional.select(
        case.g_nats, case.g_advs, [case.alpha] * count, [case.keep] * count, pools
    )
    functional.zero_and_save_(masks, case.g_advs, [None] * count)
    return []


def sort(case: Case) -> list[Tensor]:
    masks = library_masks(case, "torch")
    return Case(case.g_nats, case.g_advs, case.alpha, case.keep, "tensor").finish(masks)


def rank(score: Tensor, keep: float) -> int:
    return max(1, round(keep * score.numel()))


def topk(case: Case) -> list[Tensor]:
    return case.above(lambda s: torch.topk(s, rank(s, case.keep), sorted=False).values.min())


def kthvalue(case: Case) -> list[Tensor]:
    return case.above(lambda s: s.kthvalue(s.numel() - rank(s, case.keep) + 1).values)


def percentile(case: Case) -> list[Tensor]:
    return case.above(lambda s: float(np.percentile(s.cpu().numpy(), 100 * (1 - case.keep))))


PROVIDERS = {p.__name__: p for p in (ours, sort, topk, kthvalue, percentile)}
ON_GPU = ("ours-graph", "topk-graph", "topk-compile")


def make(name: str, case: Case) -> Callable[[], object]:
    """Return a provider for a case, warmed up."""
    plain = PROVIDERS[name.split("-")[0]]
    call: Callable[[], object] = lambda: plain(case)  # noqa: E731
    if name.endswith("-compile"):
        compiled = torch.compile(plain)
        call = lambda: compiled(case)  # noqa: E731
    for _ in range(3 if case.on_gpu else 1):
        call()
    if not name.endswith("-graph"):
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# The optimizer's step.


class Update:
    """A step of the optimizer on parameters of given shapes, scored beforehand."""

    def __init__(self, name: str, shapes: Shapes, dtype: torch.dtype, args: argparse.Namespace):
        device = torch.device(args.device)
        self.params = [torch.zeros(s, dtype=dtype, device=device).requires_grad_() for s in shapes]
        self.gradients = [
            [heavy(s, 3 * i + j, dtype, device) for i, s in enumerate(shapes)] for j in range(3)
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.params, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True
        )
        if name != "sgd":
            conserve = "gradients" if name == "ours-gradients" else "weights"
            self.optimizer = RGPSelectiveOptimizer(
                self.optimizer, update_fraction=args.keep[0], alpha=ALPHA, conserve=conserve
            )  # type: ignore[arg-type]

    def prepare(self) -> None:
        """Give the optimizer its gradients, as backward passes would."""
        natural, adversarial, training = (
            sum((p * g).sum() for p, g in zip(self.params, gradients, strict=True))
            for gradients in self.gradients
        )
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, RGPSelectiveOptimizer):
            training = self.optimizer.scored(training, natural=natural, adversarial=adversarial)
        training.backward()


UPDATES = ("sgd", "ours", "ours-gradients")


def run_update(
    model: str, shapes: Shapes, dtype: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time the optimizer's step on one model, and print the table."""
    device = torch.device(args.device)
    times: dict[str, list[float]] = {name: [] for name in UPDATES}
    updates = {name: Update(name, shapes, DTYPES[dtype], args) for name in UPDATES}
    for turn in range(args.rounds + 2):
        for name, update in updates.items():
            update.prepare()
            # The host launches a step in milliseconds; asleep, the device waits for all of it.
            seconds = measure.once(update.optimizer.step, device, 50 * measure.HEAD_START)
            times[name] += [seconds] * (turn >= 2)
    common = {"benchmark": "update", "scope": "tensor", "keep": args.keep[0]}
    common |= {"model": model, "weights": sum(map(math.prod, shapes)), "dtype": dtype}
    rows = [{**common, "provider": name, **measure.timing(times[name])} for name in UPDATES]
    lines = [measure.shown(row, float(rows[0]["p50_ms"])) for row in rows]
    print(f"\n{model}: {common['weights']:,} weights, {dtype}, keep {args.keep[0]}, one step")
    print(measure.table(["", "median ms", "p20 - p80", "against sgd"], lines))
    return measure.keep(args.csv, device, rows)


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
    case = Case.draw(shapes, dtype, keep, scope, device)
    originals = [g.clone() for g in case.g_advs] if case.on_gpu else []
    flush = torch.zeros(1 << 26, device=device) if case.on_gpu else None

    def prepare() -> None:
        for g, original in zip(case.g_advs, originals):  # noqa: B905
            g.copy_(original)
        if flush is not None:
            flush.sum()  # read, so that no lines are left to be written back during the call

    note = check(case)
    names = [n for n in args.providers if case.on_gpu or n not in ON_GPU]
    calls = {}
    for name in names:
        prepare()
        calls[name] = make(name, case)
    times = measure.interleaved(calls, args.rounds, device, prepare)
    weights, item = sum(map(math.prod, shapes)), case.g_advs[0].element_size()
    floor_bytes = weights * (3 * item if case.on_gpu else 2 * item + 1)
    floor_ms = floor_bytes / args.bandwidth * 1e3
    rows = []
    for name in names:
        row = measure.timing(times[name])
        ms = float(row["p50_ms"])
        row |= {
            "benchmark": "size" if args.sizes else "select", "model": model, "weights": weights,
            "dtype": dtype, "scope": scope, "keep": keep, "provider": name,
            "floor_bytes": floor_bytes, "gb_per_s": f"{floor_bytes / ms / 1e6:.4g}",
            "floor_share": f"{floor_ms / ms:.3f}", "note": note if name == "ours" else "",
        }  # fmt: skip
        if case.on_gpu:
            row |= on_gpu(calls[name], prepare)
        rows.append(row)
    mine = next((float(row["p50_ms"]) for row in rows if row["provider"] == "ours"), None)
    lines = [
        [*measure.shown(row, mine), f"{float(row['p50_ms']) * 1e6 / weights:.3g}"] for row in rows
    ]
    print(
        f"\n{model}: {weights:,} weights, {dtype}, scope {scope}, keep {keep}; "
        f"byte floor {floor_ms:.3g} ms; {note}"
    )
    print(measure.table(["", "median ms", "p20 - p80", "against ours", "ns/weight"], lines))
    return measure.keep(args.csv, device, rows)


def on_gpu(call: Callable[[], object], prepare: Callable[[], None]) -> dict[str, Any]:
    """Return launches, waits of the host and extra memory of one call."""
    found = {}
    prepare()
    found["host_syncs"] = measure.count_syncs(call)
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    prepare()
    found["launches"] = measure.count_launches(call)
    found["host_ms"] = f"{1e3 * measure.host_seconds(call):.4g}"
    return found


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def fractions(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(0 < f < 1 for f in found):
        raise argparse.ArgumentTypeError(f"{text!r}: each should be between 0 and 1")
    return found


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, "cpu")
    parser.add_argument("--models", type=names_of(list(MODELS)), default=["resnet18"])
    parser.add_argument("--dtypes", type=names_of(list(DTYPES)), default=["float32"])
    parser.add_argument("--scopes", type=names_of(["tensor", "global"]), default=["tensor"])
    parser.add_argument("--keep", type=fractions, default=[0.5, 0.1], help="share that is updated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--providers", type=names_of([*PROVIDERS, *ON_GPU]))
    parser.add_argument("--sizes", action="store_true", help="one tensor of many sizes instead")
    parser.add_argument("--update", action="store_true", help="the optimizer's step instead")
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    if args.providers is None:
        args.providers = ["ours", "topk", "kthvalue", "percentile"]
        args.providers += ON_GPU if device.type == "cuda" else []
    where = measure.environment(device)
    args.bandwidth = copy_bandwidth(device)
    print(
        f"{where['device']}, {where['threads'] or 'no'} CPU threads, torch {where['torch']}, "
        f"triton {where['triton'] or '-'}, numpy {where['numpy']}; "
        f"copies at {args.bandwidth / 1e9:.0f} GB/s"
    )
    rows: list[dict[str, Any]] = []
    if args.sizes:
        # 1e3 to 1e7, three to a decade
        cases = [("one tensor", [(round(10 ** (1 + i / 3)), 100)]) for i in range(13)]
    else:
        cases = [(name, MODELS[name]()) for name in args.models]
    for model, shapes in cases:
        for dtype in args.dtypes:
            for scope, keep in product(args.scopes, args.keep):
                if not args.update:
                    rows += run_case(model, shapes, dtype, scope, keep, args)
            if args.update:
                rows += run_update(model, shapes, dtype, args)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
