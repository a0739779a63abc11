"""The interface of a method: its attack in training, its loss, its state.

A method is a subclass of `Method` in a file of its own in this folder, named in `__init__.METHODS`.
The trainer gives it the network, the optimizer and what the run has decided, and calls `step` for
each batch and `begin_epoch` for each epoch. Most methods only say `perturb` and `loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rgp_optim import pgd_attack


@dataclass(frozen=True)
class Setting:
    """Settings of the run, the same for every method."""

    eps: float  # radius of the training attack, in units of the pixels
    attack_steps: int
    step_size: float  # of the attack, for methods that do not insist on one of their own
    epochs: int  # of the method
    total_steps: int
    seed: int  # of what a method draws apart from ``generator``
    classes: int
    generator: torch.Generator  # of attacks, on the device
    new_network: Callable[[], nn.Module]
    new_optimizer: Callable[[Any], torch.optim.Optimizer]
    teacher: Callable[[], nn.Module]  # trained by AT from the same start, in eval mode
    attack: str = "eager"  # how attacks on the divergence run, one of `captured.WAYS`
    # Makes the context that networks run in, with or without a cache.
    autocast: Callable[[bool], AbstractContextManager[Any]] = lambda cache: nullcontext()

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps before this epoch."""
        return epoch * (self.total_steps // self.epochs)


def start(x: Tensor, setting: Setting, *, noise: float | None = None) -> Tensor:
    """Return a uniform draw in the ball, clipped, or ``x`` with normal noise, as it is."""
    how = {"generator": setting.generator, "device": x.device, "dtype": x.dtype}
    if noise is not None:
        return x + noise * torch.randn(x.shape, **how)
    return (x + setting.eps * (2 * torch.rand(x.shape, **how) - 1)).clamp(0, 1)


def uphill(goal: Callable[[Tensor], Tensor], x_adv: Tensor) -> Tensor:
    """Return the sign of the gradient of ``goal``, a scalar function of images."""
    x_adv = x_adv.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(goal(x_adv), x_adv)
    return gradient.sign()


def within(x_adv: Tensor, x: Tensor, eps: float | Tensor) -> Tensor:
    """Project images onto the ball around ``x`` and clip them to [0, 1]."""
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for an attack."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def per_image(numbers: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per image to broadcast over the images."""
    return numbers.view(-1, *[1] * (x.dim() - 1))


class Method:
    """A row of the table; this one is the interface."""

    title: ClassVar[str]
    warm: ClassVar[bool] = False  # starts from natural weights, not from random weights
    taught: ClassVar[bool] = False  # learns from a network that AT has trained
    official: ClassVar[dict[str, Any]] = {}  # settings of its paper; a run's options replace them
    networks: ClassVar[dict[str, dict[str, Any]]] = {}  # what the paper changes for a network
    named: ClassVar[Collection[str]] = ()  # settings in its name: no preset changes them

    def __init__(self, model: nn.Module, setting: Setting, **options: Any) -> None:
        unknown = set(options) - set(self.official)
        if unknown:
            raise ValueError(f"{self.title} has no option {', '.join(sorted(unknown))}.")
        self.model, self.setting = model, setting
        self.options = {**self.official, **options}
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer; the trainer schedules its learning rate."""
        return self.setting.new_optimizer(self.model.parameters())

    def begin_epoch(self, epoch: int) -> None:
        """Called when ``epoch``, counted from 0, begins."""

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the attacked batch."""
        raise NotImplementedError

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Return the training loss, a mean over the batch."""
        raise NotImplementedError

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Take one step of the optimizer; return losses to log, detached."""
        x_adv = self.perturb(x, y)
        self.model.train()
        return self.descend(self.loss(x, x_adv, y))

    def descend(self, loss: Tensor) -> dict[str, Tensor]:
        """Take a step down a loss; return it as `step` does."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def carried(self) -> dict[str, Any]:
        """Return other objects with a ``state_dict``, by name."""
        return {}

    def pgd(self, x: Tensor, y: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return the run's PGD on the cross-entropy, from a uniform start."""
        s = self.setting
        how = {"eps": s.eps, "step_size": s.step_size, "steps": s.attack_steps}
        target = self.model if model is None else model
        return pgd_attack(target, x, y, generator=s.generator, **how)

    def ascend(self, goal: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the run's attack on a goal of the images, from normal noise, not clipped."""
        s = self.setting
        x_adv = start(x, s, noise=0.001)
        with evaluating(self.model):
            for _ in range(s.attack_steps):
                x_adv = within(x_adv + s.step_size * uphill(goal, x_adv), x, s.eps)
        return x_adv
