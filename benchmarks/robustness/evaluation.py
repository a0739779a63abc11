"""How robust a network is: the table's columns, and whether its gradients can be believed.

Everything in full precision, in eval mode, on images in [0, 1]; accuracies in percent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rgp_optim import pgd_attack

Batches = Callable[[], Any]  # yields images and labels


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).argmax(1) == y).sum()


def accuracy(
    model: nn.Module,
    batches: Batches,
    *,
    attacked: nn.Module | None = None,
    seed: int = 0,
    **attack: Any,
) -> float:
    """Return the accuracy, under PGD if ``attack`` has its settings; in percent.

    Args:
        model: Is judged.
        batches: Yields images and labels.
        attacked: The network whose gradients the attack follows; None is ``model``.
        seed: Of the attack's start.
        **attack: As in `rgp_optim.pgd_attack`.
    """
    model.eval()
    right: Tensor | int = 0  # stays on the device until the end
    count = 0
    generator = None
    for x, y in batches():
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(seed)
        if attack:
            source = model if attacked is None else attacked
            x = pgd_attack(source, x, y, generator=generator, **attack)
        right += _right(model, x, y)
        count += len(y)
    return 100 * int(right) / count


def pgd20(eps: float) -> dict[str, Any]:
    """Return PGD-20: steps of 0.003 at the published radius of 8/255, in proportion elsewhere."""
    return {"eps": eps, "steps": 20, "step_size": 0.003 * eps / (8 / 255)}


def columns(model: nn.Module, batches: Batches, eps: float) -> dict[str, float]:
    """Return natural, PGD-20 and C&W accuracy, and NRR with C&W as its Rob."""
    row = {
        "natural": accuracy(model, batches),
        "pgd20": accuracy(model, batches, **pgd20(eps)),
        "cw": accuracy(model, batches, loss="margin", **pgd20(eps)),
    }
    return {**row, "nrr": nrr(row["natural"], row["cw"])}


def nrr(natural: float, robust: float) -> float:
    """Return the harmonic mean of both accuracies, in percent."""
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0


def auto_attack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, whole: bool, seed: int = 0
) -> float:
    """Return the accuracy under AutoAttack (Croce and Hein, ICML 2020), in percent.

    Args:
        model: In eval mode.
        x: Images, all that are attacked.
        y: Their labels.
        eps: Radius.
        whole: The standard four attacks; otherwise the first two, APGD-CE and APGD-T.
        seed: Of all draws.
    """
    from pyautoattack import AutoAttack

    model.eval()
    modes = [p.requires_grad for p in model.parameters()]
    try:
        attack = AutoAttack(
            model,
            eps=eps,
            device=x.device,
            seed=seed,
            **({"version": "standard"} if whole else {"version": "custom", "attacks": FIRST_TWO}),
        )
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=250)
    finally:
        for p, mode in zip(model.parameters(), modes, strict=True):
            p.requires_grad_(mode)
            p.grad = None
    return 100 * int(_right(model, x_adv, y)) / len(y)


FIRST_TWO = ["apgd-ce", "apgd-t"]


def masking(
    model: nn.Module, batches: Batches, eps: float, surrogate: nn.Module | None = None
) -> dict[str, float]:
    """Return what the field's tests for masked gradients look at, in percent.

    An honest network loses little more to 100 steps than to 20, everything at a large radius, and
    less to images that fool another network than to its own (Athalye et al., ICML 2018; Carlini et
    al., 2019).
    """
    row = {
        "pgd20": accuracy(model, batches, **pgd20(eps)),
        "pgd100": accuracy(model, batches, **{**pgd20(eps), "steps": 100}),
        "large_eps": accuracy(
            model, batches, eps=min(1.0, 6 * eps), steps=50, step_size=0.3 * min(1.0, 6 * eps) / 2
        ),
    }
    if surrogate is not None:
        row["transfer"] = accuracy(model, batches, attacked=surrogate, **pgd20(eps))
    return row


def is_masked(row: dict[str, float], *, few: float = 3.0) -> list[str]:
    """Return which tests speak of masked gradients; ``few`` is a margin in points."""
    found = []
    if row["pgd100"] < row["pgd20"] - few:
        found.append("100 steps find much more than 20")
    if row["large_eps"] > few:
        found.append("a large radius does not fool it")
    if row.get("transfer", 100.0) < row["pgd20"] - few:
        found.append("another network's gradients fool it better than its own")
    return found
