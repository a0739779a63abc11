"""Hold the GPU's masks against torch.topk and a stable sort on large data, again and again.

    python benchmarks/gpu/exact.py                       # on a GPU, about three minutes
    python benchmarks/gpu/exact.py --small               # little data, references on the CPU
    python benchmarks/gpu/exact.py --device cpu --small  # a rehearsal, in Triton's interpreter

Ends with 1 if a check fails. With ``--small`` nothing but the library's kernels and elementwise
operations run on the GPU, for compute-sanitizer to look at (check.sh).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import Tensor

from rgp_optim import functional
from rgp_optim._reference import Entry

Pair = tuple[Tensor, Tensor]
ALPHA = 0.1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Checks:
    """The checks, at one size, on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.small = args.device, args.small
        self.where = "cpu" if args.small else args.device  # for what is not the library's
        self.big = 60_000 if args.small else 100_000_000
        self.repeats = 2 if args.small else 10_000

    # Gradients.

    def pair(self, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pair:
        """Return two heavy-tailed gradients of n weights."""
        draw = torch.Generator(self.where).manual_seed(seed)
        found = []
        for _ in range(2):
            g = torch.randn(n, generator=draw, device=self.where)
            g *= torch.randn(n, generator=draw, device=self.where).exp_()
            found.append(g.to(dtype).to(self.device))
        return found[0], found[1]

    def single(self, n: int, dtype: torch.dtype) -> list[Pair]:
        return [self.pair(n, dtype)]

    def ties(self, n: int, dtype: torch.dtype) -> list[Pair]:
        return [(self.pair(n, dtype)[0].round(),) * 2]

    def special(self, n: int, dtype: torch.dtype) -> list[Pair]:
        g, other = self.pair(n, dtype)
        g[::7], g[1::11], other[2::5], other[3::5] = float("nan"), float("inf"), 0.0, -0.0
        g[2::5] = 0.0
        return [(g, other)]

    def misaligned(self, n: int, dtype: torch.dtype) -> list[Pair]:
        a, b = self.pair(n + 3, dtype)
        return [(a[3:], b[3:])]

    def equal(self, n: int, dtype: torch.dtype) -> list[Pair]:
        return [(torch.ones(n, dtype=dtype, device=self.device),) * 2]

    def layers(self, total: int, dtype: torch.dtype = torch.float32) -> list[Pair]:
        """Return gradients of tensors of very different sizes."""
        sizes = [1, 7, 512, total // 1000, total // 30, total // 10, total // 3, total // 2]
        return [self.pair(max(1, n), dtype, i) for i, n in enumerate(sizes)]

    def mixed(self) -> list[Pair]:
        return [self.pair(self.big // 3, dtype, i) for i, dtype in enumerate(DTYPES)]

    # Ways to look at a mask.

    def masks(
        self, pairs: Sequence[Pair], keep: float, scope: str = "tensor", backend: str = "triton"
    ) -> list[Tensor]:
        g_nats, g_advs = zip(*pairs, strict=True)
        return functional.rgp_topk_masks(
            g_nats, g_advs, alpha=ALPHA, update_fraction=keep, scope=scope, backend=backend
        )  # type: ignore[arg-type]

    def sort(self, draw: Callable[[], list[Pair]], keep: float, scope: str = "tensor") -> bool:
        """Compare with a stable sort."""
        pairs = draw()
        got = self.masks(pairs, keep, scope)
        pairs = [(a.to(self.where), b.to(self.where)) for a, b in pairs]
        want = self.masks(pairs, keep, scope, "torch")
        return all(torch.equal(a.to(self.where), b) for a, b in zip(got, want, strict=True))

    def topk(self, keep: float) -> bool:
        """Compare with torch.topk, which shares nothing with this library; no scores tie."""
        pair = self.pair(self.big)
        mask, *pair = (t.to(self.where) for t in (*self.masks([pair], keep), *pair))
        score = pair[0].abs().float() * ALPHA + pair[1].abs().float() * (1 - ALPHA)
        k = max(1, round(keep * score.numel()))
        least = torch.topk(score, k, sorted=False).values.min()
        return bool((mask.sum() == k) & mask[score > least].all() & ~mask[score < least].any())

    def steps(self, dtype: torch.dtype) -> bool:
        """Mask, save and restore, as a step does."""
        g_nats, targets = zip(*self.layers(self.big, dtype), strict=True)
        wanted = self.masks([*zip(g_nats, targets, strict=True)], 0.5)
        g_advs = [b.clone() for b in targets]
        weights = [self.pair(b.numel(), dtype, 50 + i)[0] for i, b in enumerate(targets)]
        before = [w.clone() for w in weights]
        pairs = enumerate(zip(g_nats, targets, strict=True))
        entries = [Entry(*pair, ALPHA, 0.5, i) for i, pair in pairs]
        chosen = functional.select(entries, backend="triton")
        rows = [*zip(chosen, targets, weights, strict=True)]
        saved = functional.zero_and_save_(rows, backend="triton")
        for w in weights:
            w.mul_(1.5).add_(1.0)
        rows = [*zip(chosen, weights, saved, strict=True)]
        functional.restore_(rows, backend="triton")
        good = True
        for mask, target, g, w, old in zip(wanted, targets, g_advs, weights, before, strict=True):
            good &= torch.equal(target, torch.where(mask, g, 0.0))
            good &= torch.equal(w, torch.where(mask, old * 1.5 + 1.0, old))
        return good

    def again(self) -> bool:
        """Select again and again; a race would change a bit."""
        pairs = [*self.layers(300_000 if not self.small else 3000), self.pair(self.big // 20)]
        first = self.masks(pairs, 0.5)
        same = torch.ones((), dtype=torch.bool, device=first[0].device)
        for _ in range(self.repeats):
            for mask, repeated in zip(first, self.masks(pairs, 0.5), strict=True):
                same &= (mask == repeated).all()
        return bool(same)

    def beyond(self) -> bool:
        """Select where indices need 64 bits; ranks are known by construction, with ties."""
        n = 60_000 if self.small else 2**31 + 4096
        g = torch.zeros(n, dtype=torch.bfloat16, device=self.device)
        g[-3000:] = 1.0
        g[: n // 4] = 2.0
        k = n // 4 + 1000
        (mask,) = self.masks([(g, g)], k / n)
        return bool(mask[: n // 4].all() & mask[-3000:-2000].all()) and int(mask.sum()) == k

    # The list.

    def all(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        n = self.big
        size = f"{n:.0e} values"
        for keep in (0.5, 0.1, 0.999, 1e-6):
            yield f"{size}, update {keep}: torch.topk", partial(self.topk, keep)
        cases: dict[str, tuple[Any, ...]] = {
            "": (self.single, 0.5),
            ", with ties": (self.ties, 0.3),
            ", with NaN, infinity and zeros": (self.special, 0.3),
            ", not aligned": (self.misaligned, 0.5),
            ", all equal": (self.equal, 0.5),
            " of layers, by tensor": (self.layers, 0.5),
            " of layers, all together": (self.layers, 0.5, "global"),
        }
        for dtype in DTYPES:
            name = f"{size} in {str(dtype).removeprefix('torch.')}"
            for what, (draw, *how) in cases.items():
                yield name + what, partial(self.sort, partial(draw, n, dtype), *how)
            yield f"{name}: masked, saved and put back", partial(self.steps, dtype)
        yield f"{size} of three dtypes, all together", partial(self.sort, self.mixed, 0.5, "global")
        yield f"{self.repeats} repeats give the same masks", self.again
        yield (
            f"{'few' if self.small else 'more than 2^31'} values in bfloat16, two of them",
            self.beyond,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="60,000 values")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available here; --device cpu --small rehearses in the interpreter")
    failed = 0
    for name, check in Checks(args).all():
        start = time.perf_counter()
        try:
            good = check()
        except RuntimeError as error:
            good, name = False, f"{name}: {error}"
        failed += not good
        if args.device == "cuda":
            torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        print(f"{'ok    ' if good else 'FAILED'}  {name}  ({seconds:.1f} s)", flush=True)
    print("all masks are as they should be" if not failed else f"{failed} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
