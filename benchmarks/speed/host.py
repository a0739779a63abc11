"""Overhead of the wrapper: its step against SGD's, its passes against three plain ones.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/speed/host.py [--csv FILE]
    python benchmarks/speed/host.py --device cuda --models resnet18,wrn34-10,vit-b    # fused SGD

Without models it is the fixed cost, host time on 62 tiny tensors (ResNet-18's structure). On a GPU
this is the time that the device may wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import measure
import selection
import torch
from torch import Tensor, nn

from rgp_optim import RGPSelectiveOptimizer

TINY = "62 tiny tensors"
WARM_UP = 20


class Tiny(nn.Sequential):
    """62 tensors, 21 of them with two or more dimensions, as ResNet-18 has."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for _ in range(20):
            layers += [nn.Linear(4, 4, bias=False), nn.LayerNorm(4)]
        super().__init__(*layers, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


class Given(nn.Module):
    """Weights of given shapes; the loss has the gradients that it is called with."""

    def __init__(self, shapes: selection.Shapes) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.weights, gradients, strict=True))


class Loop:
    """One way to train, split into its backward passes and its step; plain where keep is None."""

    def __init__(self, keep: float | None, model: str, device: torch.device) -> None:
        torch.manual_seed(0)
        if model == TINY:
            self.model, x = Tiny().to(device), torch.randn(4, 4).to(device)
            self.inputs, options = [x, x + 0.1], {}
        else:
            shapes = selection.MODELS[model]()
            self.model, options = Given(shapes).to(device), {"weight_decay": 5e-4, "fused": True}
            self.inputs = selection.heavy(shapes, "float32", device)
        how = {"lr": 0.01, "momentum": 0.9, **options}
        opt: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **how)
        self.opt = opt if keep is None else RGPSelectiveOptimizer(opt, update_fraction=keep)

    def forward(self) -> None:
        self.opt.zero_grad()
        self.losses = [self.model(x) for x in self.inputs]

    def backward(self) -> None:
        natural, adversarial = self.losses
        loss = natural + adversarial
        if isinstance(self.opt, RGPSelectiveOptimizer):
            loss = self.opt.scored(loss, natural=natural, adversarial=adversarial)
        else:  # the passes themselves
            for each in (natural, adversarial):
                torch.autograd.grad(each, list(self.model.parameters()), retain_graph=True)
        loss.backward()


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__, "cpu")
    parser.add_argument("--models", type=selection.names_of(*selection.MODELS), default=[TINY])
    parser.add_argument("--keep", type=float, default=0.7, help="fraction updated")
    parser.add_argument("--repeats", type=measure.positive, default=300)
    args = parser.parse_args(argv)
    device = measure.device_of(args, parser)
    for model in args.models:
        loops = {"wrapped": Loop(args.keep, model, device), "plain": Loop(None, model, device)}
        calls: dict[str, Callable[[], object]] = {}
        for name, loop in loops.items():
            calls |= {f"passes {name}": loop.backward, f"step {name}": loop.opt.step}
        before = {f"passes {name}": loop.forward for name, loop in loops.items()}
        head_start = 50 * measure.HEAD_START  # the host launches a step in milliseconds
        times = measure.interleaved(calls, args.repeats + WARM_UP, device, before, head_start)
        common: dict[str, Any] = {"dtype": "float32", "scope": "tensor", "keep": args.keep}
        weights = sum(p.numel() for p in loops["plain"].model.parameters())
        common |= {"model": model, "weights": weights}
        for what in ("passes", "step"):
            kind = f"{'host' if model == TINY else 'update'} {what}"
            rows = [
                {**common, "benchmark": kind, "provider": name}
                | measure.timing(times[f"{what} {name}"][WARM_UP:])
                for name in loops
            ]
            measure.show(f"{what}, {model}", measure.keep(args.csv, device, rows), "plain")


if __name__ == "__main__":
    main(sys.argv[1:])
