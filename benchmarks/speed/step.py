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
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import captured
from harness.networks import NETWORKS

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
        self.reviser = ConsistencyReviser(self.model, rate=1.0) if name == "cure" else None
        if name.startswith("cure"):
            how = {"update_fraction": KEEP, "alpha": ALPHA, "reviser": self.reviser}
            self.optimizer = RGPSelectiveOptimizer(self.sgd, **how)
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
        else:
            loss, natural, adversarial = self.losses(self.attack(self.x))
        if self.name == "authors":
            authors_update(self.model, self.sgd, loss, natural, adversarial)
            average(self.average, self.model)
            return
        if isinstance(self.optimizer, RGPSelectiveOptimizer):
            loss = self.optimizer.scored(loss, natural=natural, adversarial=adversarial)
        loss.backward()
        self.optimizer.step()


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


def parts(args: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Time the parts of a step by themselves."""
    step, plain = Step("cure-update", args), Step("trades", args)
    state: dict[str, Any] = {}

    def backward() -> None:
        loss, natural, adversarial = state["losses"]
        step.optimizer.scored(loss, natural=natural, adversarial=adversarial).backward()

    def plain_losses() -> None:
        plain.sgd.zero_grad()
        state["plain"] = plain.losses(state["x_adv"])[0]

    calls: dict[str, Callable[[], object]] = {
        "attack": lambda: state.update(x_adv=step.attack(step.x)),
        "two forward passes": lambda: state.update(losses=step.losses(state["x_adv"])),
        "three backward passes": backward,
        "the wrapper's step": step.optimizer.step,
        "one backward pass (TRADES)": lambda: state.pop("plain").backward(),
        "the plain SGD's step": plain.sgd.step,
    }
    before = {"two forward passes": step.optimizer.zero_grad}
    before["one backward pass (TRADES)"] = plain_losses
    times = measure.interleaved(calls, args.rounds + 1, torch.device(args.device), before)
    found = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}
    found["selection"] = found["the wrapper's step"] - found["the plain SGD's step"]
    common = common | {"benchmark": "part", "repeats": args.rounds}
    return [{**common, "provider": name, "p50_ms": f"{ms:.4g}"} for name, ms in found.items()]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = measure.parser(__doc__, "cpu")
    add = parser.add_argument
    add("--network", choices=tuple(NETWORKS), default="resnet8")
    add("--batch-sizes", type=measure.positive, nargs="+", default=[128])
    add("--steps", type=measure.positive, default=10, help="of the attack")
    add("--rounds", type=measure.positive, default=9)
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true")
    add("--attack", choices=captured.WAYS, default="eager")
    add("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    add("--profile", type=Path, help="write the operations of a step to this file")
    args = parser.parse_args(argv)
    if "graph" in args.attack and args.device == "cpu":
        parser.error(f"--attack {args.attack}: a CPU has no CUDA graphs")
    device = measure.device_of(args, parser)
    rows = []
    for batch_size in args.batch_sizes:
        args.batch_size = batch_size
        rows += measure.keep(args.csv, device, run(args))
    return rows


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all providers with one batch size, and print the tables."""
    device = torch.device(args.device)
    torch._dynamo.reset()  # or a second batch size is compiled for any
    steps = {name: Step(name, args) for name in args.providers}
    for step in steps.values():  # cuDNN and the compiler settle down
        for _ in range(3 if device.type == "cuda" else 1):
            step()
    times = measure.interleaved(steps, args.rounds, device)
    weights = sum(p.numel() for p in next(iter(steps.values())).model.parameters())
    way = "" if args.attack == "eager" else f", {args.attack}"
    common = {"benchmark": "step", "scope": "tensor", "keep": KEEP}
    common |= {"dtype": "bfloat16 autocast" if args.amp else "float32"}
    common |= {"model": args.network, "weights": weights}
    common |= {"note": f"batch {args.batch_size}, PGD-{args.steps}{way}"}
    rows = [{**common, "provider": name, **measure.timing(times[name])} for name in steps]
    print(f"\n{args.network}, {common['dtype']}, {common['note']}")
    measure.show("a training step", rows, "trades")
    if "cure-update" in steps:
        found = parts(args, common)
        print()
        whole = [row for row in rows if row["provider"] == "cure-update"]
        measure.show("its parts", whole + found, "cure-update")
        rows += found
    if args.profile and "cure" in steps:
        with args.profile.open("a") as file:
            file.write(f"batch {args.batch_size}, {args.attack}\n{operations(steps['cure'])}\n")
    return rows


def operations(step: Step, calls: int = 3) -> str:
    """Return the operations of a step, the longest first."""
    with profile() as profiler:  # of the host and, where there is one, the GPU
        for _ in range(calls):
            step()
        if step.x.is_cuda:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if step.x.is_cuda else "self_cpu_time_total"
    found: str = profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
