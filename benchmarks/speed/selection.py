"""How long score, exact selection and masking of a model's gradients take, against other ways.

    python benchmarks/speed/selection.py --device cpu               # ResNet-18, one thread
    python benchmarks/speed/selection.py --device cuda --models resnet18,wrn34-10,vit-b,1b
    python benchmarks/speed/selection.py --sizes              # one tensor of 1e3 to 1e7 weights
    python benchmarks/speed/selection.py --update                   # the optimizer's step around it

Timed is all from two lists of gradients to the result: on a CPU the masks, on a GPU the adversarial
gradients, set to 0 in place where conserved. Gradients are drawn at random, with a scale that
differs by row; on a GPU they are restored, and its cache filled with something else, before each
call. Providers are interleaved in one run, so that ratios hold on a busy machine. `--csv` appends
the rows. On a GPU times are the GPU's; what the host needs to launch a call is in ``host_ms``.

    ours        this library
    sort        its specification: a stable sort of each tensor
    topk        torch.topk of each tensor, its least value, comparison
    kthvalue    torch.kthvalue of each tensor, comparison
    percentile  np.percentile of each tensor on the CPU, comparison: the authors' way
    ...-graph   the same in a CUDA graph; ...-compile: under torch.compile

With `--update` the step of the optimizer is timed instead, all gradients being there already:

    sgd             torch's SGD, fused, with momentum and weight decay
    ours            the same, wrapped; conserved weights stay as they are
    ours-gradients  the same with conserve="gradients"

The byte floor is what any exact way must move: both gradients read once, and the masked one
written (12 bytes for each float32 weight), or the mask (9). Its time is that of a copy of as many
bytes on this device, in this run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import Tensor

from rgp_optim import RGPSelectiveOptimizer, functional

Shapes = list[tuple[int, ...]]


# The models: shapes of the parameters in which weights are selected, two dimensions or more.


def resnet18() -> Shapes:
    """ResNet-18 for CIFAR-10."""
    shapes: Shapes = [(64, 3, 3, 3)]
    c_in = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, c_in, 3, 3), (width, width, 3, 3)]
            if c_in != width:
                shapes.append((width, c_in, 1, 1))
            c_in = width
    return [*shapes, (10, 512)]


def wrn34_10() -> Shapes:
    """WideResNet-34-10 for CIFAR-10."""
    shapes: Shapes = [(16, 3, 3, 3)]
    c_in = 16
    for width in (160, 320, 640):
        for _ in range(5):
            shapes += [(width, c_in, 3, 3), (width, width, 3, 3)]
            if c_in != width:
                shapes.append((width, c_in, 1, 1))
            c_in = width
    return [*shapes, (10, 640)]


def vit_b() -> Shapes:
    """ViT-B/16 for ImageNet, with its class token and position embedding."""
    block: Shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(768, 3, 16, 16), (1, 1, 768), (1, 197, 768), *block * 12, (1000, 768)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet18": resnet18,
    "wrn34-10": wrn34_10,
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


def ours(case: Case) -> list[Tensor]:
    count = len(case.g_advs)
    if not case.on_gpu:
        return functional.rgp_topk_masks(
            case.g_nats, case.g_advs, alpha=case.alpha, update_fraction=case.keep, scope=case.scope
        )
    pools = [0] * count if case.scope == "global" else list(range(count))
    masks = functional.select(
        case.g_nats, case.g_advs, [case.alpha] * count, [case.keep] * count, pools
    )
    functional.zero_and_save_(masks, case.g_advs, [None] * count)
    return []


def sort(case: Case) -> list[Tensor]:
    masks = functional.rgp_topk_masks(
        case.g_nats, case.g_advs, alpha=case.alpha, update_fraction=case.keep, scope=case.scope,
        backend="torch",
    )  # fmt: skip
    return Case(case.g_nats, case.g_advs, case.alpha, case.keep, "tensor").finish(masks)


def count(score: Tensor, keep: float) -> int:
    return max(1, round(keep * score.numel()))


def topk(case: Case) -> list[Tensor]:
    masks = []
    for score in case.scores():
        least = torch.topk(score.flatten(), count(score, case.keep), sorted=False).values.min()
        masks.append(score >= least)
    return case.finish(masks)


def kthvalue(case: Case) -> list[Tensor]:
    masks = []
    for score in case.scores():
        n = score.numel()
        masks.append(score >= score.flatten().kthvalue(n - count(score, case.keep) + 1).values)
    return case.finish(masks)


def percentile(case: Case) -> list[Tensor]:
    masks = []
    for score in case.scores():
        threshold = np.percentile(score.cpu().numpy(), 100 * (1 - case.keep))
        masks.append(score >= float(threshold))
    return case.finish(masks)


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
                self.optimizer, update_fraction=args.keep[0], alpha=args.alpha, conserve=conserve
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
    weights = sum(math.prod(s) for s in shapes)
    rows, lines = [], []
    base = measure.quantiles(times["sgd"])[1]
    for name in UPDATES:
        p20, p50, p80 = (1e3 * t for t in measure.quantiles(times[name]))
        rows.append({
            "benchmark": "update", "model": model, "weights": weights, "dtype": dtype,
            "scope": "tensor", "keep": args.keep[0], "provider": name, "p20_ms": f"{p20:.4g}",
            "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}", "repeats": args.rounds,
        })  # fmt: skip
        lines.append([name, f"{p50:.4g}", f"{p20:.4g} - {p80:.4g}", f"{p50 / 1e3 / base:.2f} x"])
    print(f"\n{model}: {weights:,} weights, {dtype}, keep {args.keep[0]}, a step of the optimizer")
    print(measure.table(["", "median ms", "p20 - p80", "against sgd"], lines))
    return rows


# The run.


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second, read and written, of a large copy."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    times = [measure.once(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * source.numel() * 4 / sorted(times)[4]


def check(case: Case) -> str:
    """Compare the masks with those of a stable sort."""
    options = dict(alpha=case.alpha, update_fraction=case.keep, scope=case.scope)
    if sum(g.numel() for g in case.g_advs) > 2e8:
        return "masks not compared: too large to sort"
    got = functional.rgp_topk_masks(case.g_nats, case.g_advs, **options)
    want = functional.rgp_topk_masks(case.g_nats, case.g_advs, **options, backend="torch")
    if not all(map(torch.equal, got, want)):
        raise AssertionError("the masks are not those of a stable sort")
    return "masks equal to a stable sort's"


def run_case(
    model: str, shapes: Shapes, dtype: str, scope: str, keep: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time all providers on one case, and print the table."""
    device = torch.device(args.device)
    g_nats = [heavy(s, 2 * i, DTYPES[dtype], device) for i, s in enumerate(shapes)]
    g_advs = [heavy(s, 2 * i + 1, DTYPES[dtype], device) for i, s in enumerate(shapes)]
    case = Case(g_nats, g_advs, args.alpha, keep, scope)
    originals = [g.clone() for g in g_advs] if case.on_gpu else []
    flush = torch.zeros(1 << 26, device=device) if case.on_gpu else None

    def prepare() -> None:
        for g, original in zip(g_advs, originals):  # noqa: B905
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
    weights = sum(math.prod(s) for s in shapes)
    item = g_advs[0].element_size()
    floor_bytes = weights * (3 * item if case.on_gpu else 2 * item + 1)
    floor_ms = floor_bytes / args.bandwidth * 1e3
    rows = []
    for name in names:
        p20, p50, p80 = (1e3 * t for t in measure.quantiles(times[name]))
        row = {
            "benchmark": "size" if args.sizes else "select", "model": model, "weights": weights,
            "dtype": dtype, "scope": scope, "keep": keep, "provider": name, "p20_ms": f"{p20:.4g}",
            "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}", "repeats": args.rounds,
            "floor_bytes": floor_bytes, "gb_per_s": f"{floor_bytes / p50 / 1e6:.4g}",
            "floor_share": f"{floor_ms / p50:.3f}", "note": note if name == "ours" else "",
        }  # fmt: skip
        if case.on_gpu:
            row |= on_gpu(calls[name], prepare)
        rows.append(row)
    show(rows, floor_ms)
    return rows


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


def show(rows: Sequence[dict[str, Any]], floor_ms: float) -> None:
    """Print one case."""
    first = rows[0]
    print(
        f"\n{first['model']}: {first['weights']:,} weights, {first['dtype']}, "
        f"scope {first['scope']}, keep {first['keep']}; byte floor {floor_ms:.3g} ms; "
        f"{first['note'] or 'not compared'}"
    )
    mine = next((float(r["p50_ms"]) for r in rows if r["provider"] == "ours"), math.nan)
    lines = [
        [
            r["provider"],
            r["p50_ms"],
            f"{r['p20_ms']} - {r['p80_ms']}",
            f"{float(r['p50_ms']) * 1e6 / r['weights']:.3g}",
            f"{float(r['p50_ms']) / mine:.2f} x",
        ]
        for r in rows
    ]
    print(measure.table(["", "median ms", "p20 - p80", "ns/weight", "against ours"], lines))


def goals(rows: Sequence[dict[str, Any]]) -> None:
    """Say whether a CPU reaches what the project promises."""
    for row in rows:
        if row["provider"] != "ours" or row["benchmark"] != "select" or row["weights"] < 1e6:
            continue
        same = ("model", "dtype", "scope", "keep")
        peers = {r["provider"]: r for r in rows if all(r[c] == row[c] for c in same)}
        for name, goal in (("percentile", 5.0), ("kthvalue", 4.5)):
            if name in peers:
                ratio = float(peers[name]["p50_ms"]) / float(row["p50_ms"])
                print(
                    f"{row['model']}, keep {row['keep']}, scope {row['scope']}: {ratio:.1f} times "
                    f"faster than {name} (goal {goal:g}: {'yes' if ratio >= goal else 'NO'})"
                )


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=names_of(list(MODELS)), default=["resnet18"])
    parser.add_argument("--dtypes", type=names_of(list(DTYPES)), default=["float32"])
    parser.add_argument("--scopes", type=names_of(["tensor", "global"]), default=["tensor"])
    parser.add_argument("--keep", type=fractions, default=[0.5, 0.1], help="share that is updated")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--providers", type=names_of([*PROVIDERS, *ON_GPU]))
    parser.add_argument("--sizes", action="store_true", help="one tensor of many sizes instead")
    parser.add_argument("--update", action="store_true", help="the optimizer's step instead")
    parser.add_argument(
        "--csv", type=Path, help=f"append the rows, as {measure.RESULTS.name} has them"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available here")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
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

    def keep_rows(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        if args.csv:  # at once: a limit of time may come
            measure.append_rows(args.csv, [{**where, **row} for row in new])

    if args.sizes:
        cases = [("one tensor", [(n // 100, 100)]) for n in sizes()]
    else:
        cases = [(name, MODELS[name]()) for name in args.models]
    for model, shapes in cases:
        for dtype in args.dtypes:
            if args.update:
                keep_rows(run_update(model, shapes, dtype, args))
                continue
            for scope in args.scopes:
                for keep in args.keep:
                    keep_rows(run_case(model, shapes, dtype, scope, keep, args))
    print()
    if device.type == "cpu" and not args.update:
        goals(rows)
    if args.csv:
        print(f"{len(rows)} rows added to {args.csv}")
    return rows


def sizes() -> list[int]:
    """Return 1e3 to 1e7, three to a decade."""
    return [round(10 ** (3 + i / 3) / 100) * 100 for i in range(13)]


if __name__ == "__main__":
    main(sys.argv[1:])
