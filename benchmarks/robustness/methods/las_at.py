"""LAS-AT (Jia et al., CVPR 2022): a second network learns which attack each image gets.

The strategy network chooses, for each image, the radius, the number of steps and their length. It
is trained by REINFORCE: an attack is good if it has a high loss, and if a copy of the target
network that is updated by one step on it is then more robust and still right on natural images.
"""

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Method, Setting, evaluating, per_image, start, uphill, within

RADII = range(3, 16)  # in 255ths of a pixel at the published radius of 8
STEPS = range(3, 15)
LENGTHS = range(1, 6)  # in 255ths, as the radii


class LASAT(Method):
    title = "LAS-AT"
    steps = 0
    official: ClassVar = {
        "smoothing": 0.7, "strategy_lr": 1e-4, "every": 20, "robust": 4.0, "clean": 2.0,
    }  # fmt: skip

    def __init__(self, model: Any, setting: Setting, **options: Any) -> None:
        super().__init__(model, setting, **options)
        self.strategy = Strategy(setting.new_network(), setting.classes)
        like = next(model.parameters())
        self.strategy.to(like.device, like.dtype)
        self.strategy_optimizer = torch.optim.SGD(
            self.strategy.parameters(), lr=self.options["strategy_lr"]
        )

    def begin_epoch(self, epoch: int) -> None:
        self.steps = self.setting.steps_before(epoch)

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps % self.options["every"] == 0:
            self.train_strategy(x, y)
        self.strategy.eval()
        with torch.no_grad():
            choice, _ = self.strategy.sample(x, self.setting.generator)
        x_adv = self.attack(x, y, choice)
        self.model.train()
        return self.descend(smoothed_loss(self.model(x_adv), y, self.options["smoothing"]))

    def train_strategy(self, x: Tensor, y: Tensor) -> None:
        """Take a step of REINFORCE; the reward is one number, without a baseline."""
        self.strategy.train()
        choice, log_probability = self.strategy.sample(x, self.setting.generator)
        reward = self.reward(x, self.attack(x, y, choice), y)
        self.strategy_optimizer.zero_grad()
        (-reward * log_probability).mean().backward()
        nn.utils.clip_grad_norm_(self.strategy.parameters(), 1.0)
        self.strategy_optimizer.step()

    def attack(self, x: Tensor, y: Tensor, choice: Tensor) -> Tensor:
        """Run PGD with each image's own radius, steps and length."""
        s = self.setting
        unit = s.eps / (8 / 255) / 255  # of the published radius
        eps, length = (per_image(choice[:, i] * unit, x) for i in (0, 2))
        most = s.attack_steps / 10  # the published range of steps is for an attack of ten
        steps = (choice[:, 1] * most).round().clamp(min=1)
        x_adv = start(x, s)
        with evaluating(self.model):
            for done in range(round(STEPS[-1] * most)):
                ahead = uphill(lambda x: F.cross_entropy(self.model(x), y, reduction="sum"), x_adv)
                ahead = within(x_adv + length * ahead, x, eps)
                x_adv = torch.where(per_image(steps > done, x), ahead, x_adv)
        return x_adv

    def reward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Return CE_adv, at most 10, + 4 robust + 2 clean accuracy of the updated copy."""
        with evaluating(self.model), torch.no_grad():
            ce = F.cross_entropy(self.model(x_adv), y).clamp(max=10)
        copied = copy.deepcopy(self.model).train()
        lr = self.optimizer.param_groups[0]["lr"]
        optimizer = torch.optim.SGD(copied.parameters(), lr=lr, weight_decay=5e-4)
        smoothed_loss(copied(x_adv), y, self.options["smoothing"]).backward()
        optimizer.step()
        copied.eval()
        again = self.pgd(x, y, copied)
        with torch.no_grad():
            robust = (copied(again).argmax(1) == y).to(ce.dtype).mean()
            clean = (copied(x).argmax(1) == y).to(ce.dtype).mean()
        return ce + self.options["robust"] * robust + self.options["clean"] * clean

    def carried(self) -> dict[str, Any]:
        return {"strategy": self.strategy, "strategy_optimizer": self.strategy_optimizer}


class Strategy(nn.Module):
    """Chooses radius, steps and length for each image: three categorical draws."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network = network  # its outputs, one for each class, are the features
        sizes = [len(each) for each in (RADII, STEPS, LENGTHS)]
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return log-probabilities of the three choices, each [batch, number]."""
        h = F.relu(self.network(x))
        return [F.log_softmax(head(h), 1) for head in self.heads]

    def sample(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the choices, [batch, 3], and the log-probability of each image's, [batch]."""
        chosen, total = [], torch.zeros(len(x), device=x.device)
        for log_p, values in zip(self(x), (RADII, STEPS, LENGTHS), strict=True):
            index = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            chosen.append(values.start + values.step * index.squeeze(1))
            total = total + log_p.gather(1, index).squeeze(1)
        return torch.stack(chosen, 1), total


def smoothed_loss(logits: Tensor, y: Tensor, confidence: float) -> Tensor:
    """Return the cross-entropy with ``confidence`` on the true class, the rest on the others."""
    classes = logits.shape[1]
    target = torch.full_like(logits, (1 - confidence) / (classes - 1))
    target.scatter_(1, y[:, None], confidence)
    return F.cross_entropy(logits, target)
