"""Adversarially robust distillation (Goldblum et al., AAAI 2020): imitate a robust teacher.

The divergence is a mean over images and classes, as in the authors' code.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .act import soft_kl
from .base import Method, Setting


class ARD(Method):
    title = "ARD"
    taught = True
    official: ClassVar = {"a": 1.0, "temperature": 30.0}

    def __init__(self, model: Any, setting: Setting, **options: Any) -> None:
        super().__init__(model, setting, **options)
        self.teacher = setting.teacher()

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pgd(x, y)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(x)
        a, temperature = self.options["a"], self.options["temperature"]
        logits = self.model(x_adv)
        kl = soft_kl(taught, logits, temperature) / logits.shape[1]
        loss = a * temperature**2 * kl
        if a < 1:
            loss = loss + (1 - a) * F.cross_entropy(self.model(x), y)
        return loss
