"""Squeeze training (Li, Guo, Zuo and Chen, ICLR 2023): bring a neighbourhood's extremes together.

Beside the adversarial image, where the true class is least likely, there is a collaborative one,
where it is most likely. Both are sought at once, and the loss squeezes the gap between the lowest
and the highest probability of the true class among natural, adversarial and collaborative image.
The weight of that gap is TRADES's, 6.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method, evaluating, start, within


class STAT(Method):
    title = "ST-AT"
    official: ClassVar = {"beta": 6.0}

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x_adv, x_col = self.extremes(x, y)
        self.model.train()
        logits = [self.model(each) for each in (x, x_adv, x_col)]
        return self.descend(squeeze_loss(logits, y, self.options["beta"]))

    def extremes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Widen the gap: at each step from the lowest and the highest of the three images."""
        s = self.setting
        rows = torch.arange(len(y), device=y.device)
        x_adv, x_col = (start(x, s, noise=0.001) for _ in range(2))
        with evaluating(self.model):
            for _ in range(s.attack_steps):
                three = [each.detach().requires_grad_() for each in (x, x_adv, x_col)]
                logits = [self.model(each) for each in three]
                gradients = torch.autograd.grad(gap(logits, y, "sum"), three)
                images, signs = torch.stack(three).detach(), torch.stack(gradients).sign()
                x_adv, x_col = (
                    within(images[each, rows] + s.step_size * signs[each, rows], x, s.eps)
                    for each in lowest_and_highest(logits, y)
                )
        return x_adv, x_col


def symmetric_kl(first: Tensor, second: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return (KL(p || q) + KL(q || p)) / 2; no gradient goes into the first of either KL."""
    log_p, log_q = F.log_softmax(first, 1), F.log_softmax(second, 1)
    there = F.kl_div(log_q, log_p.detach(), reduction=reduction, log_target=True)
    back = F.kl_div(log_p, log_q.detach(), reduction=reduction, log_target=True)
    return (there + back) / 2


def lowest_and_highest(logits: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each image, which prediction gives the true class least, and which most."""
    stacked = torch.stack(logits).detach()  # [3, batch, classes]
    true = F.softmax(stacked, 2).gather(2, y.expand(len(logits), -1)[..., None]).squeeze(2)
    return true.argmin(0), true.argmax(0)


def gap(logits: list[Tensor], y: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return how far the predictions are apart that give the true class least and most."""
    lowest, highest = lowest_and_highest(logits, y)
    stacked, rows = torch.stack(logits), torch.arange(len(y), device=y.device)
    return symmetric_kl(stacked[highest, rows], stacked[lowest, rows], reduction)


def squeeze_loss(logits: list[Tensor], y: Tensor, beta: float) -> Tensor:
    """Return CE(x) + beta * the gap among natural, adversarial and collaborative logits."""
    return F.cross_entropy(logits[0], y) + beta * gap(logits, y)
