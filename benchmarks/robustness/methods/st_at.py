"""Squeeze training (Li and Liu, ICCV 2023): bring the extremes of a neighbourhood together.

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
    paper = "Li and Liu, ICCV 2023"
    official: ClassVar = {"beta": 6.0}
    published: ClassVar = {
        "wrn34-10": (84.92, 57.73, 53.54, None, None),
        "resnet18": (83.10, 54.62, 50.50, 51.43, 63.53),
    }

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x_adv, x_col = self.extremes(x, y)
        self.model.train()
        logits = [self.model(each) for each in (x, x_adv, x_col)]
        loss = squeeze_loss(logits, y, self.options["beta"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def extremes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Move both images together, to where the gap that will be squeezed is widest."""
        s = self.setting
        both = [start(x, s, noise=0.001) for _ in range(2)]
        with evaluating(self.model):
            with torch.no_grad():
                logits = self.model(x)
            for _ in range(s.attack_steps):
                both = [each.detach().requires_grad_() for each in both]
                found = [logits, *(self.model(each) for each in both)]
                gradients = torch.autograd.grad(gap(found, y, "sum"), both)
                both = [
                    within(each.detach() + s.step_size * gradient.sign(), x, s.eps)
                    for each, gradient in zip(both, gradients, strict=True)
                ]
        return both[0], both[1]


def symmetric_kl(first: Tensor, second: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return (KL(p || q) + KL(q || p)) / 2 of two predictions."""
    log_p, log_q = F.log_softmax(first, 1), F.log_softmax(second, 1)
    there = F.kl_div(log_q, log_p, reduction=reduction, log_target=True)
    back = F.kl_div(log_p, log_q, reduction=reduction, log_target=True)
    return (there + back) / 2


def gap(logits: list[Tensor], y: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return how far the predictions are apart that give the true class least and most."""
    stacked = torch.stack(logits)  # [3, batch, classes]
    true = F.softmax(stacked, 2).gather(2, y.expand(len(logits), -1)[..., None]).squeeze(2)
    rows = torch.arange(len(y), device=y.device)
    return symmetric_kl(stacked[true.argmax(0), rows], stacked[true.argmin(0), rows], reduction)


def squeeze_loss(logits: list[Tensor], y: Tensor, beta: float) -> Tensor:
    """Return CE(x) + beta * the gap among natural, adversarial and collaborative logits."""
    return F.cross_entropy(logits[0], y) + beta * gap(logits, y)
