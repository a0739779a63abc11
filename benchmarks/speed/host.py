"""Host time per step: the fixed cost of the wrapper, on 62 tiny tensors (ResNet-18's structure).

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/speed/host.py [--csv FILE]

Medians of `step()` beside the plain SGD's, and of a backward pass that takes scores beside three
plain passes. On a GPU this is the time that the device may wait.
"""

from __future__ import annotations

import statistics
from functools import partial

import measure
import torch
from torch import Tensor, nn

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

    def losses(self) -> tuple[Tensor, Tensor]:
        self.opt.zero_grad()
        return self.model(self.x).square().mean(), self.model(self.x + 0.1).square().mean()

    def backward(self, natural: Tensor, adversarial: Tensor) -> None:
        loss = natural + adversarial
        if isinstance(self.opt, RGPSelectiveOptimizer):
            loss = self.opt.scored(loss, natural=natural, adversarial=adversarial)
        else:  # the passes themselves
            for each in (natural, adversarial):
                torch.autograd.grad(each, list(self.model.parameters()), retain_graph=True)
        loss.backward()


def main() -> None:
    parser = measure.parser(__doc__, "cpu")
    parser.add_argument("--repeats", type=int, default=300)
    args = parser.parse_args()
    device, loops = measure.device_of(args, parser), {"wrapped": Loop(True), "plain": Loop(False)}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(args.repeats + 20):
        for name, loop in loops.items():
            passes = partial(loop.backward, *loop.losses())
            passes, step = (measure.once(call, device) for call in (passes, loop.opt.step))
            if repeat >= 20:
                times.setdefault(("passes", name), []).append(passes)
                times.setdefault(("step", name), []).append(step)
    common = {"model": "62 tiny tensors", "weights": 500, "dtype": "float32", "scope": "tensor"}
    rows = [
        common | {"benchmark": f"host {what}", "keep": 0.7, "provider": name, **measure.timing(t)}
        for (what, name), t in times.items()
    ]
    measure.keep(args.csv, device, rows)
    for what, against in (("passes", "three plain passes"), ("step", "SGD's step")):
        wrapped, plain = (1e3 * statistics.median(times[what, n]) for n in ("wrapped", "plain"))
        print(f"{what}: {wrapped:.2f} ms, {against}: {plain:.2f} ms, ratio {wrapped / plain:.2f}")


if __name__ == "__main__":
    main()
