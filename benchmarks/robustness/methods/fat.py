"""Friendly adversarial training (Zhang et al., ICML 2020): stop soon after the first mistake."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .at import AT
from .base import evaluating, per_image, start, within


class FAT(AT):
    title = "FAT"
    # Steps beyond the first mistake, from these parts of the run on: epochs 0, 50, 90 of 120.
    official: ClassVar = {"taus": ((0.0, 0), (50 / 120, 1), (90 / 120, 2)), "omega": 0.001}
    tau = 0

    def begin_epoch(self, epoch: int) -> None:
        done = epoch / self.setting.epochs
        self.tau = [tau for start, tau in self.options["taus"] if done >= start][-1]

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.setting
        first = start(x, s)
        with evaluating(self.model):
            how = (s.eps, s.step_size, s.attack_steps, self.tau, self.options["omega"])
            return friendly_pgd(self.model, x, y, first, *how, s.generator)


def friendly_pgd(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    first: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    tau: int,
    omega: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return each image as it is ``tau`` steps after it was first misclassified.

    Every step adds normal noise of standard deviation ``omega``.
    """
    x_adv = first.detach()
    left = torch.full_like(y, tau)  # steps that an image may still take once it fools the model
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        wrong = logits.argmax(1) != y
        moving = ~wrong | (left > 0)
        left = left - (wrong & moving).to(left.dtype)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        ahead = within(x_adv.detach() + step_size * gradient.sign() + omega * noise, x, eps)
        x_adv = torch.where(per_image(moving, x), ahead, x_adv.detach())
    return x_adv.detach()
