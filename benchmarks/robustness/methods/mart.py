"""MART (Wang et al., ICLR 2020): misclassified images weigh more."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method


class MART(Method):
    title = "MART"
    official: ClassVar = {"beta": 5.0}

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ascend(lambda x: F.cross_entropy(self.model(x), y, reduction="sum"), x)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return mart_loss(self.model(x), self.model(x_adv), y, self.options["beta"])


def mart_loss(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """Return BCE(p_adv, y) + beta * mean[KL(p || p_adv) (1.0000001 - p_y)].

    BCE is the cross-entropy plus the negative log of 1.0001 minus the best wrong probability.
    """
    p_adv = F.softmax(logits_adv, 1)
    wrong = p_adv.scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(logits_adv, y) - torch.log(1.0001 - wrong + 1e-12).mean()
    p = F.softmax(logits, 1)
    true = p.gather(1, y[:, None]).squeeze(1)
    kl = F.kl_div(torch.log(p_adv + 1e-12), p, reduction="none").sum(1)
    return boosted + beta * (kl * (1.0000001 - true)).mean()
