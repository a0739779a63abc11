"""A whole training step: plain, TRADES, CURE with this library, and the authors' implementation.

    python benchmarks/speed/step.py                                  # a small network on a CPU
    python benchmarks/speed/step.py --device cuda --network resnet18 --amp       # bfloat16
    python benchmarks/speed/step.py ... --attack compile-graph --batch-sizes 128 256 512

The second table times the parts of ``cure-update``, which is CURE without the reviser;
"selection" is the wrapper's step less the plain SGD's. ``authors`` is the released way: four
backward passes through kept graphs, np.percentile on the CPU, masks multiplied in, the average
updated parameter by parameter; its attack is always eager.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import captured
from networks import NETWORKS

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss

PROVIDERS = ("standard", "trades", "cure", "cure-update", "authors")
KEEP, ALPHA, BETA = 0.7, 0.1, 5.0


class Step:
    """One way to train, with a network and an optimizer of its own."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.name, self.args = name, args
        device = torch.device(args.device)
        self.x = torch.rand(args.batch_size, 3, 32, 32, device=device)
        self.y = torch.randint(0, 10, (args.batch_size,), device=device)
        self.model: nn.Module = NETWORKS[args.network](channels=3, classes=10).to(device)
        for key, buffer in self.model.named_buffers():
            if key.endswith("num_batches_tracked"):
                buffer.fill_(1000)  # as of a trained network
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        how = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
        self.sgd = torch.optim.SGD(self.model.parameters(), **how)
        self.optimizer: Any = self.sgd
        if name.startswith("cure"):
            self.optimizer = RGPSelectiveOptimizer(self.sgd, update_fraction=KEEP, alpha=ALPHA)
        self.reviser = ConsistencyReviser(self.model, rate=1.0) if name == "cure" else None
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        way = "eager" if name == "authors" else args.attack
        self.attack = captured.kl_attack_of(
            self.model, way, self.autocast, eps=8 / 255, steps=args.steps
        )

    def autocast(self, cache: bool = True) -> torch.autocast:
        amp = self.args.amp
        return torch.autocast(self.args.device, torch.bfloat16, enabled=amp, cache_enabled=cache)

    def losses(self, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and cross-entropy on both batches."""
        with self.autocast():
            logits, logits_adv = self.model(self.x), self.model(x_adv)
            loss = kl_adv_loss(logits, logits_adv, self.y, beta=BETA)
            if self.reviser is not None:
                loss = loss + self.reviser(self.x, x_adv, logits, logits_adv)
            elif self.name == "authors":
                with torch.no_grad():
                    old, old_adv = self.average(self.x), self.average(x_adv)
                loss = loss + F.mse_loss(logits, old) + F.mse_loss(logits_adv, old_adv)
            natural, adversarial = (F.cross_entropy(z, self.y) for z in (logits, logits_adv))
        return loss, natural, adversarial

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if self.name == "standard":
            with self.autocast():
                loss = F.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            return
        loss, natural, adversarial = self.losses(self.attack(self.x))
        if self.name == "authors":
            authors_update(self.model, self.sgd, loss, natural, adversarial)
            average(self.average, self.model)
            return
        if self.name == "trades":
            loss.backward()
        else:
            loss = self.optimizer.scored(loss, natural=natural, adversarial=adversarial)
            loss.backward()
        self.optimizer.step()
        if self.reviser is not None:
            self.reviser.update()


def authors_update(
    model: nn.Module, sgd: torch.optim.SGD, loss: Tensor, natural: Tensor, adversarial: Tensor
) -> None:
    """Update as the released code does, with the score of the paper."""
    selected = [p for p in model.parameters() if p.dim() >= 2]
    gradients = []
    for each in (natural, adversarial):
        sgd.zero_grad()
        each.backward(retain_graph=True)
        gradients.append([None if p.grad is None else p.grad.clone() for p in selected])
    sgd.zero_grad()
    (natural + adversarial).backward(retain_graph=True)  # the fourth: taken, and not used
    sgd.zero_grad()
    loss.backward()
    for p, g_nat, g_adv in zip(selected, *gradients, strict=True):
        assert p.grad is not None
        p.grad *= authors_mask(g_nat, g_adv, ALPHA, KEEP)
    sgd.step()


def authors_mask(g_nat: Tensor, g_adv: Tensor, alpha: float, keep: float) -> Tensor:
    """Return 1 where the score is not below its percentile, computed on the CPU."""
    score = alpha * g_nat.abs() + (1 - alpha) * g_adv.abs()
    threshold = np.percentile(score.float().cpu().numpy(), 100 * (1 - keep))
    return (score >= float(threshold)).to(g_nat.dtype)


@torch.no_grad()
def average(copied: nn.Module, model: nn.Module, decay: float = 0.999) -> None:
    for old, new in zip(copied.parameters(), model.parameters(), strict=True):
        old.mul_(decay).add_(new, alpha=1 - decay)


def parts(args: argparse.Namespace) -> dict[str, list[float]]:
    """Time the parts of a step by themselves; seconds."""
    device = torch.device(args.device)
    step, plain = Step("cure-update", args), Step("trades", args)
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        found: list[Any] = []
        times.setdefault(name, []).append(measure.once(lambda: found.append(call()), device))
        return found[0]

    for _ in range(args.rounds + 1):
        x_adv = timed("attack", lambda: step.attack(step.x))
        step.optimizer.zero_grad()
        loss, natural, adversarial = timed("two forward passes", lambda: step.losses(x_adv))  # noqa: B023
        timed(
            "three backward passes",
            step.optimizer.scored(loss, natural=natural, adversarial=adversarial).backward,
        )
        timed("the wrapper's step", step.optimizer.step)
        plain.sgd.zero_grad()
        loss = plain.losses(x_adv)[0]
        timed("one backward pass (TRADES)", lambda: loss.backward())  # noqa: B023
        timed("the plain SGD's step", plain.sgd.step)
    return {name: seconds[1:] for name, seconds in times.items()}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, "cpu")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet8")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--attack", choices=captured.WAYS, default="eager")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--profile", type=Path, help="write the operations of a step to this file")
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    for name in ("batch_sizes", "steps", "rounds"):
        given = getattr(args, name)
        if min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name.replace('_', '-')}: it should be at least 1")
    if "graph" in args.attack and args.device == "cpu":
        parser.error(f"--attack {args.attack}: a CPU has no CUDA graphs")
    where = measure.environment(device)
    rows = []
    for batch_size in args.batch_sizes:
        args.batch_size = batch_size
        rows += measure.keep(args.csv, device, run(args, where))
    return rows


def run(args: argparse.Namespace, where: dict[str, str]) -> list[dict[str, Any]]:
    """Time all providers with one batch size, and print the tables."""
    device = torch.device(args.device)
    torch._dynamo.reset()  # or a second batch size is compiled for any
    steps = {name: Step(name, args) for name in args.providers}
    for step in steps.values():  # cuDNN and the compiler settle down
        for _ in range(3 if device.type == "cuda" else 1):
            step()
    times = measure.interleaved(steps, args.rounds, device)
    weights = sum(p.numel() for p in next(iter(steps.values())).model.parameters())
    precision = "bfloat16 autocast" if args.amp else "float32"
    print(
        f"{where['device']}, {where['threads'] or 'no'} CPU threads, torch {where['torch']}: "
        f"{args.network}, batch {args.batch_size}, {precision}, {args.attack} attack of "
        f"{args.steps} steps\n"
    )
    way = "" if args.attack == "eager" else f", {args.attack}"
    common = {"benchmark": "step", "scope": "tensor", "keep": KEEP, "dtype": precision}
    common |= {"model": args.network, "weights": weights}
    common |= {"note": f"batch {args.batch_size}, PGD-{args.steps}{way}"}
    rows = [{**common, "provider": name, **measure.timing(times[name])} for name in steps]
    base = next((float(row["p50_ms"]) for row in rows if row["provider"] == "trades"), None)
    lines = [measure.shown(row, base) for row in rows]
    print(measure.table(["a training step", "median ms", "p20 - p80", "against trades"], lines))
    if "cure-update" in steps:
        rows += show_parts(args, rows)
    if args.profile and "cure" in steps:
        with args.profile.open("a") as file:
            file.write(f"batch {args.batch_size}, {args.attack}\n{operations(steps['cure'])}\n")
    print()
    return rows


def operations(step: Step, calls: int = 3) -> str:
    """Return the operations of a step, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = step.x.is_cuda
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    found: str = profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
    return found


def show_parts(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print and return where a step spends its time."""
    found = {name: 1e3 * measure.quantiles(t)[1] for name, t in parts(args).items()}
    found["selection"] = found["the wrapper's step"] - found["the plain SGD's step"]
    whole = next(float(row["p50_ms"]) for row in rows if row["provider"] == "cure-update")
    lines = [[name, f"{ms:.4g}", f"{ms / whole:.1%}"] for name, ms in found.items()]
    print("\n" + measure.table(["part of cure-update", "median ms", "of the step"], lines))
    common = {k: v for k, v in rows[0].items() if not k.startswith("p")}
    return [
        {**common, "benchmark": "part", "provider": name, "p50_ms": f"{ms:.4g}"}
        for name, ms in found.items()
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
