"""Adversarial concurrent training (Arani et al., BMVC 2020).

A robust and a natural network teach each other.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method, Setting


class ACT(Method):
    title = "ACT"
    official: ClassVar = {"a": 0.9, "temperature": 4.0}

    def __init__(self, model: Any, setting: Setting, **options: Any) -> None:
        super().__init__(model, setting, **options)
        self.natural = setting.new_network()
        self.natural_optimizer = setting.new_optimizer(self.natural.parameters())

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x_adv = self.perturb(x, y)
        self.model.train()
        self.natural.train()
        robust, natural = self.model(x_adv), self.natural(x)
        losses = act_losses(robust, natural, y, self.options["a"], self.options["temperature"])
        lr = self.optimizer.param_groups[0]["lr"]  # on the schedule of the robust network
        self.natural_optimizer.param_groups[0]["lr"] = lr
        for optimizer, loss in zip((self.optimizer, self.natural_optimizer), losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": losses[0].detach(), "loss_natural_network": losses[1].detach()}

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Ascend the mean cross-entropy and the summed divergence from the natural network."""
        a = self.options["a"]
        self.natural.train()
        with torch.no_grad():
            target = F.log_softmax(self.natural(x), 1)

        def goal(x_adv: Tensor) -> Tensor:
            logits = self.model(x_adv)
            kl = F.kl_div(F.log_softmax(logits, 1), target, reduction="sum", log_target=True)
            return (1 - a) * F.cross_entropy(logits, y) + a * kl

        return self.ascend(goal, x)

    def carried(self) -> dict[str, Any]:
        return {"natural": self.natural, "natural_optimizer": self.natural_optimizer}


def act_losses(
    robust: Tensor, natural: Tensor, y: Tensor, a: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the losses of the robust and of the natural network.

    Each is (1 - a) CE + a T^2 KL(the other's prediction || its own), both softened by T, without a
    gradient into the other.
    """
    losses = []
    for own, other in ((robust, natural), (natural, robust)):
        kl = soft_kl(other.detach(), own, temperature)
        losses.append((1 - a) * F.cross_entropy(own, y) + a * temperature**2 * kl)
    return losses[0], losses[1]


def soft_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of predictions softened by a temperature, a batch mean."""
    p = F.log_softmax(teacher / temperature, 1)
    q = F.log_softmax(student / temperature, 1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)
