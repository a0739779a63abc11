"""Adversarial training (Madry et al., ICLR 2018): the cross-entropy of attacked images."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .base import Method


class AT(Method):
    title = "AT"
    published: ClassVar = {
        "wrn34-10": (85.17, 55.08, 44.04, 52.91, 65.27),
        "resnet18": (82.78, 51.30, 44.63, 49.72, 62.12),
    }

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pgd(x, y)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x_adv), y)


class PretrainedAT(AT):
    """The control: AT from the start that CURE has."""

    title = "AT, pre-trained"
    warm = True
    published: ClassVar = {"resnet18": (84.37, 43.92, None, None, None)}  # Table 5
