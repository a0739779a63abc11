"""AutoAttack, and whether a network's gradients can be believed.

Everything in full precision, in eval mode, on images in [0, 1]; accuracies in percent.
"""

from __future__ import annotations

from harness.training import Batches, accuracy, pgd20
from torch import Tensor, nn

FIRST_TWO = ["apgd-ce", "apgd-t"]


def auto_attack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, whole: bool, seed: int = 0
) -> float:
    """Return the accuracy under AutoAttack (Croce and Hein, ICML 2020), in percent.

    All four attacks if ``whole``; otherwise the first two, APGD-CE and APGD-T.
    """
    from pyautoattack import AutoAttack

    model.eval()
    modes = [p.requires_grad for p in model.parameters()]
    try:
        which = {"version": "standard"} if whole else {"version": "custom", "attacks": FIRST_TWO}
        attack = AutoAttack(model, eps=eps, device=x.device, seed=seed, **which)
        attack.apgd.n_restarts = 1  # as in the standard version; else 5
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=250)
    finally:
        for p, mode in zip(model.parameters(), modes, strict=True):
            p.requires_grad_(mode)
            p.grad = None
    return accuracy(model, lambda: [(x_adv, y)])


def masking(
    model: nn.Module, batches: Batches, eps: float, surrogate: nn.Module | None = None
) -> dict[str, float]:
    """Return what the field's tests for masked gradients look at, in percent.

    An honest network loses little more to 100 steps than to 20, everything at a large radius, and
    less to images that fool another network than to its own (Athalye et al., ICML 2018; Carlini et
    al., 2019).
    """
    large = min(1.0, 6 * eps)
    row = {
        "pgd20": accuracy(model, batches, **pgd20(eps)),
        "pgd100": accuracy(model, batches, **{**pgd20(eps), "steps": 100}),
        "large_eps": accuracy(model, batches, eps=large, steps=50, step_size=0.3 * large / 2),
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
