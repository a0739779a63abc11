"""The smallest perturbation that fools a network, for each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from methods.base import evaluating, per_image, uphill, within
from torch import Tensor, nn


def smallest_radius(
    model: nn.Module, x: Tensor, y: Tensor, *, most: float, halvings: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Bisect the radius at which PGD fools the network, exact to ``most / 2**halvings``.

    Returns for each image the smallest radius that fooled the network, 0 where it is wrong already
    and infinity where ``most`` is not enough; and the images that fooled it.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    with evaluating(model):
        with torch.no_grad():
            wrong = model(x).argmax(1) != y
        low, high = torch.zeros(len(x), device=x.device), torch.full((len(x),), most).to(x)
        found, fooled = _attack(model, x, y, high, generator)
        reached = fooled | wrong
        best = found
        for _ in range(halvings):
            middle = (low + high) / 2
            found, fooled = _attack(model, x, y, middle, generator)
            best = torch.where(per_image(fooled, x), found, best)
            high, low = torch.where(fooled, middle, high), torch.where(fooled, low, middle)
    high = torch.where(reached, high, torch.inf)
    return torch.where(wrong, 0.0, high), torch.where(per_image(wrong, x), x, best)


def _attack(
    model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return PGD-20's images, each with its own radius, and which of them fool the network."""
    radius = per_image(eps, x)
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    x_adv = (x + radius * (2 * draw - 1)).clamp(0, 1)
    for _ in range(20):
        sign = uphill(lambda z: F.cross_entropy(model(z), y, reduction="sum"), x_adv)
        x_adv = within(x_adv + 2.5 / 20 * radius * sign, x, radius)
    with torch.no_grad():
        return x_adv, model(x_adv).argmax(1) != y
