"""Adversarial training (Madry et al., ICLR 2018): the cross-entropy of attacked images."""

import torch.nn.functional as F
from torch import Tensor

from .base import Method


class AT(Method):
    title = "AT"

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pgd(x, y)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x_adv), y)


class PretrainedAT(AT):
    """Control: AT from CURE's start."""

    title = "AT, pre-trained"
    warm = True
