"""Host time per step: the fixed cost of the wrapper, on 62 tiny tensors (ResNet-18's structure).

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/speed/host.py [--csv FILE]

Medians of `step()` beside the plain SGD's, and of a backward pass that takes scores beside three
plain passes. On a GPU this is the time that the device may wait.
"""

from __future__ import annotations

from collections.abc import Callable

import measure
import torch
from torch import nn

from rgp_optim import RGPSelectiveOptimizer


def network() -> nn.Module:
    """62 tensors, 21 of them with two or more dimensions, as ResNet-18 has."""
    layers: list[nn.Module] = []
    for _ in range(20):
        layers += [nn.Linear(4, 4, bias=False), nn.LayerNorm(4)]
    return nn.Sequential(*layers, nn.Linear(4, 4))


class Loop:
    """One way to train, split into its backward passes and its step."""

    def __init__(self, scored: bool) -> None:
        torch.manual_seed(0)
        self.model, self.x = network(), torch.randn(4, 4)
        opt: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.opt = RGPSelectiveOptimizer(opt) if scored else opt

    def forward(self) -> None:
        self.opt.zero_grad()
        self.losses = [self.model(x).square().mean() for x in (self.x, self.x + 0.1)]

    def backward(self) -> None:
        natural, adversarial = self.losses
        loss = natural + adversarial
        if isinstance(self.opt, RGPSelectiveOptimizer):
            loss = self.opt.scored(loss, natural=natural, adversarial=adversarial)
        else:  # the passes themselves
            for each in (natural, adversarial):
                torch.autograd.grad(each, list(self.model.parameters()), retain_graph=True)
        loss.backward()


def main() -> None:
    parser = measure.parser(__doc__, "cpu")
    parser.add_argument("--repeats", type=measure.positive, default=300)
    args = parser.parse_args()
    device, loops = measure.device_of(args, parser), {"wrapped": Loop(True), "plain": Loop(False)}
    calls: dict[str, Callable[[], object]] = {}
    for name, loop in loops.items():
        calls |= {f"passes {name}": loop.backward, f"step {name}": loop.opt.step}

    def prepare(call: str) -> None:
        what, name = call.split()
        if what == "passes":
            loops[name].forward()

    times = measure.interleaved(calls, args.repeats + 20, device, prepare)
    common = {"model": "62 tiny tensors", "weights": 500, "dtype": "float32", "scope": "tensor"}
    for what in ("passes", "step"):
        rows = [
            common
            | {"benchmark": f"host {what}", "keep": 0.7, "provider": name}
            | measure.timing(times[f"{what} {name}"][20:])
            for name in loops
        ]
        measure.show(what, measure.keep(args.csv, device, rows), "plain")


if __name__ == "__main__":
    main()
