"""Hold the GPU's masks against torch.topk and a stable sort on large data, again and again.

    python benchmarks/gpu_exact.py                      # on a GPU
    python benchmarks/gpu_exact.py --device cpu --small  # a rehearsal, in Triton's interpreter

Each line is one check; the program ends with 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import Tensor

from rgp_optim import functional


def gradients(n: int, seed: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return two heavy-tailed gradients of n weights."""
    draw = torch.Generator(device).manual_seed(seed)
    pair = []
    for _ in range(2):
        g = torch.randn(n, generator=draw, device=device)
        pair.append(g.mul_(torch.randn(n, generator=draw, device=device).exp_()).to(dtype))
    return pair[0], pair[1]


def ours(
    pairs: Sequence[tuple[Tensor, Tensor]], keep: float, scope: str = "tensor"
) -> list[Tensor]:
    g_nats, g_advs = zip(*pairs, strict=True)
    return functional.rgp_topk_masks(
        g_nats, g_advs, alpha=0.1, update_fraction=keep, scope=scope, backend="triton"
    )  # fmt: skip


def against_sort(
    pairs: Sequence[tuple[Tensor, Tensor]], keep: float, scope: str = "tensor"
) -> bool:
    g_nats, g_advs = zip(*pairs, strict=True)
    want = functional.rgp_topk_masks(
        g_nats, g_advs, alpha=0.1, update_fraction=keep, scope=scope, backend="torch"
    )
    return all(map(torch.equal, ours(pairs, keep, scope), want))


def against_topk(pair: tuple[Tensor, Tensor], keep: float) -> bool:
    """Compare with torch.topk, which shares nothing with this library; scores do not tie."""
    score = pair[0].abs().float() * 0.1 + pair[1].abs().float() * 0.9
    k = max(1, round(keep * score.numel()))
    least = torch.topk(score, k, sorted=False).values.min()
    (mask,) = ours([pair], keep)
    return bool((mask.sum() == k) & mask[score > least].all() & ~mask[score < least].any())


def repeats(pairs: Sequence[tuple[Tensor, Tensor]], times: int) -> bool:
    """Select again and again; a race would change a bit."""
    first = ours(pairs, 0.5)
    same = torch.ones((), dtype=torch.bool, device=first[0].device)
    for _ in range(times):
        for mask, again in zip(first, ours(pairs, 0.5), strict=True):
            same &= (mask == again).all()
    return bool(same)


def checks(args: argparse.Namespace) -> list[tuple[str, Callable[[], bool]]]:
    device = args.device
    big = 200_000 if args.small else 100_000_000
    medium = 50_000 if args.small else 5_000_000
    rounds = 2 if args.small else args.repeats

    def pair(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
        return gradients(n, seed, dtype, device)

    def ties(n: int) -> tuple[Tensor, Tensor]:
        g = pair(n)[0].round()
        return g, g

    def special(n: int) -> tuple[Tensor, Tensor]:
        g, other = pair(n)
        g[::7], g[1::11], other[2::5], other[3::5] = float("nan"), float("inf"), 0.0, -0.0
        g[2::5] = 0.0
        return g, other

    def misaligned(n: int) -> tuple[Tensor, Tensor]:
        a, b = pair(n + 3)
        return a[3:], b[3:]

    layers = [pair(n, seed=n) for n in (1, 7, 512, 9408, 36864, 147456, 5120)]
    mixed = [pair(90_000, d, 1) for d in (torch.float32, torch.bfloat16, torch.float16)]
    found: list[tuple[str, Callable[[], bool]]] = []
    for keep in (0.5, 0.1, 0.999, 1e-6):
        found.append(
            (
                f"{big:.0e} values, keep {keep}: torch.topk",
                lambda k=keep: against_topk(pair(big), k),
            )
        )  # type: ignore[misc]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found.append(
            (
                f"{medium:.0e} {name}: stable sort",
                lambda d=dtype: against_sort([pair(medium, d)], 0.5),
            )
        )  # type: ignore[misc]
    found += [
        (f"{medium:.0e} values with ties", lambda: against_sort([ties(medium)], 0.3)),
        (
            f"{medium:.0e} values with NaN, infinity and zeros",
            lambda: against_sort([special(medium)], 0.3),
        ),
        (f"{medium:.0e} values, not aligned", lambda: against_sort([misaligned(medium)], 0.5)),
        ("all equal", lambda: against_sort([(torch.ones(medium, device=device),) * 2], 0.5)),
        ("layers, by tensor", lambda: against_sort(layers, 0.5)),
        ("layers, all together", lambda: against_sort(layers, 0.5, "global")),
        ("three dtypes together", lambda: against_sort(mixed, 0.5, "global")),
        (f"{rounds} repeats give the same masks", lambda: repeats([*layers, pair(medium)], rounds)),
    ]
    if not args.small:
        found.append(("more than 2^31 values in bfloat16", lambda: beyond(device)))
    return found


def beyond(device: str) -> bool:
    """Select in a tensor whose indices need 64 bits; ranks are known by construction."""
    n = 2**31 + 4096
    g = torch.zeros(n, dtype=torch.bfloat16, device=device)
    g[-3000:] = 1.0
    g[: n // 4] = 2.0
    (mask,) = functional.rgp_topk_masks(
        [g], [g], alpha=0.5, update_fraction=(n // 4 + 1000) / n, backend="triton"
    )
    return bool(mask[: n // 4].all() & mask[-3000:-2000].all()) and int(mask.sum()) == n // 4 + 1000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal")
    parser.add_argument("--repeats", type=int, default=10_000)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available here; --device cpu --small rehearses in the interpreter")
    failed = 0
    for name, check in checks(args):
        start = time.perf_counter()
        good = check()
        failed += not good
        print(
            f"{'ok    ' if good else 'FAILED'}  {name}  ({time.perf_counter() - start:.1f} s)",
            flush=True,
        )
    print("all masks are as they should be" if not failed else f"{failed} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
