"""TRADES (Zhang et al., ICML 2019): the natural cross-entropy and a divergence under attack."""

from functools import cached_property
from typing import Any, ClassVar

from captured import kl_attack_of
from torch import Tensor

from rgp_optim import kl_adv_loss

from .base import Method


class TRADES(Method):
    title = "TRADES"
    official: ClassVar = {"beta": 6.0}

    @cached_property
    def attack(self) -> Any:
        s = self.setting
        how = {"eps": s.eps, "step_size": s.step_size, "steps": s.attack_steps}
        return kl_attack_of(self.model, s.attack, s.autocast, s.generator, **how)

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.attack(x)
        return found

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return kl_adv_loss(self.model(x), self.model(x_adv), y, beta=self.options["beta"])


class PretrainedTRADES(TRADES):
    """Control: TRADES with CURE's start and beta."""

    title = "TRADES, pre-trained"
    warm = True
    official: ClassVar = {"beta": 5.0}
