"""Introspective adversarial distillation, IAD-I (Zhu et al., ICLR 2022).

Trust the teacher as far as it is right about the attacked image, and oneself for the rest.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .act import soft_kl
from .ard import ARD


class IAD(ARD):
    title = "IAD"
    introspective = False
    # Introspection begins at epoch 60 of 200; before, the teacher is alone.
    official: ClassVar = {"b": 0.1, "begin": 60 / 200}

    def begin_epoch(self, epoch: int) -> None:
        self.introspective = epoch / self.setting.epochs >= self.options["begin"]

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            taught, taught_adv = self.teacher(x), self.teacher(x_adv)
        logits, logits_adv = self.model(x), self.model(x_adv)
        if not self.introspective:
            return soft_kl(taught, logits_adv, 1.0)
        return iad_loss(logits, logits_adv, taught, taught_adv, y, self.options["b"])


def iad_loss(
    logits: Tensor, logits_adv: Tensor, taught: Tensor, taught_adv: Tensor, y: Tensor, b: float
) -> Tensor:
    """Return KL(t(x) || s(x_adv)) + mean[(1 - q^b) KL(s(x) || s(x_adv))].

    q is the teacher's probability of the true class on the attacked image.
    """
    q = F.softmax(taught_adv, 1).gather(1, y[:, None]).squeeze(1)
    own = F.kl_div(
        F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1), reduction="none", log_target=True
    ).sum(1)
    return soft_kl(taught, logits_adv, 1.0) + ((1 - q**b) * own).mean()
