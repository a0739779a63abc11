"""Layer by layer: gradients, features, fraction of weights updated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from methods.base import evaluating
from torch import Tensor, nn


def gradient_sizes(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor
) -> dict[str, tuple[float, float]]:
    """Return, for each tensor with two or more dimensions, the mean absolute gradient.

    Of the cross-entropy of natural, then of attacked images, per weight.
    """
    named = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    sizes = []
    with evaluating(model):
        for images in (x, x_adv):
            loss = F.cross_entropy(model(images), y)
            gradients = torch.autograd.grad(loss, list(named.values()))
            sizes.append([float(g.abs().mean()) for g in gradients])
    return {name: (a, b) for name, a, b in zip(named, *sizes, strict=True)}


def updated_early_and_late(
    history: Sequence[dict[str, Any]], share: float = 0.2
) -> dict[str, tuple[float, float]]:
    """Return the fraction of each layer's weights that was updated, early and late.

    Constant under ``scope="tensor"``; look at runs with the global scope.
    """
    rows = [row["updated"] for row in history if "updated" in row]
    some = max(1, round(share * len(rows)))
    return {
        name: tuple(sum(row[name] for row in part) / some for part in (rows[:some], rows[-some:]))
        for name in (rows[0] if rows else ())
    }


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC from two Gram matrices of a minibatch, n > 3.

    Song et al., JMLR 2012; for CKA over minibatches Nguyen et al., ICLR 2021.
    """
    n = len(k)
    k, m = k - torch.diag(k.diag()), m - torch.diag(m.diag())
    whole = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (whole - 2 / (n - 2) * (k.sum(0) @ m.sum(1))) / (n * (n - 3))


@torch.no_grad()
def cka(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]
) -> list[list[float]]:
    """Return the linear CKA of each pair of modules' features.

    A row for each module that sees the natural images, a column for each that sees the attacked.
    """
    n = len(names)
    both, own = torch.zeros(n, n, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
    kept: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, out: Tensor) -> None:
        features = out.flatten(1).double()
        kept[name] = features @ features.T

    with evaluating(model), ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(partial(keep, name))
            hooks.enter_context(hook)
        for pair in batches:
            grams = []
            for images in pair:
                model(images)
                grams.append([kept[name] for name in names])
            both += torch.tensor([[float(hsic(k, m)) for m in grams[1]] for k in grams[0]])
            own += torch.tensor([[float(hsic(k, k)) for k in each] for each in grams])
    found: list[list[float]] = (both / own[0].outer(own[1]).sqrt()).tolist()
    return found
