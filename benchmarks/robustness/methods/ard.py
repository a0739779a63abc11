"""Adversarially robust distillation (Goldblum et al., AAAI 2020): imitate a robust teacher.

The divergence is a mean over images and classes, as in the authors' code.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .act import soft_kl
from .at import AT
from .base import Setting


class ARD(AT):
    title = "ARD"
    taught = True
    official: ClassVar = {"temperature": 30.0}

    def __init__(self, model: Any, setting: Setting, **options: Any) -> None:
        super().__init__(model, setting, **options)
        self.teacher = setting.teacher()

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(x)
        temperature = self.options["temperature"]
        logits = self.model(x_adv)
        return temperature**2 * soft_kl(taught, logits, temperature) / logits.shape[1]
