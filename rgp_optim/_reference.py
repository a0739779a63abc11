"""Score, select, conserve in plain torch: the specification that every backend is tested against.

Nothing here checks its arguments; `functional` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def update_count(n: int, update_fraction: float) -> int:
    """Return k, how many of ``n`` weights are updated: max(1, round(update_fraction * n))."""
    if n == 0 or update_fraction == 0.0:
        return 0
    return max(1, round(update_fraction * n))


def score_dtype(gradient: Tensor) -> torch.dtype:
    """Return float64 for float64 and complex128 gradients, float32 for all others."""
    wide = gradient.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def rgp_score(g_nat: Tensor | None, g_adv: Tensor | None, alpha: float) -> Tensor:
    """Return alpha * |g_nat| + (1 - alpha) * |g_adv|; a gradient that is missing counts as 0.

    Two products and one sum, each rounded: no fused multiply-add, so that all backends agree. A
    weight of 0 takes its term out altogether, so that an infinite gradient there is no NaN.
    """
    terms = []
    for gradient, share in ((g_nat, alpha), (g_adv, 1.0 - alpha)):
        if gradient is not None and share != 0.0:
            size = gradient.abs().to(score_dtype(gradient))
            terms.append(size if share == 1.0 else size * share)
    if not terms:
        present = g_nat if g_nat is not None else g_adv
        assert present is not None
        return torch.zeros_like(present, dtype=score_dtype(present))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def topk_mask(score: Tensor, update_fraction: float) -> Tensor:
    """Return a mask of the k highest scores, without those that are 0; ties go to the lowest index.

    NaN ranks above infinity, all NaN alike. 1 selects everything, zeros included; 0 nothing.
    """
    if update_fraction == 1.0:
        return torch.ones_like(score, dtype=torch.bool)
    flat = score.reshape(-1)
    ranked = torch.where(flat.isnan(), math.nan, flat)  # one NaN: sorts may rank their payloads
    order = torch.sort(ranked, descending=True, stable=True).indices
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask.index_fill_(0, order[: update_count(flat.numel(), update_fraction)], True)
    return (mask & (flat != 0)).view(score.shape)


def topk_masks(
    scores: Sequence[Tensor], fractions: Sequence[float], pools: Sequence[int]
) -> list[Tensor]:
    """Return one mask for each score; those with the same pool number share one threshold."""
    members: dict[int, list[int]] = {}
    for i, pool in enumerate(pools):
        members.setdefault(pool, []).append(i)
    masks: dict[int, Tensor] = {}
    for indices in members.values():
        mine = [scores[i] for i in indices]
        if len(mine) > 1:
            joined = topk_mask(_join(mine), fractions[indices[0]])
            parts = torch.split(joined, [score.numel() for score in mine])
            for i, score, part in zip(indices, mine, parts, strict=True):
                masks[i] = part.view(score.shape).to(score.device)
        else:
            masks[indices[0]] = topk_mask(mine[0], fractions[indices[0]])
    return [masks[i] for i in range(len(scores))]


def _join(scores: Sequence[Tensor]) -> Tensor:
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    return torch.cat([score.reshape(-1).to(scores[0].device, dtype) for score in scores])


def select(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    pools: Sequence[int],
) -> Selection:
    """Score and select; see `rgp_score` and `topk_masks`."""
    pairs = zip(g_nats, g_advs, alphas, strict=True)
    return Selection(topk_masks([rgp_score(*pair) for pair in pairs], fractions, pools))


class Selection:
    """What was selected in a list of tensors, and what a step does with it."""

    def __init__(self, masks: list[Tensor]) -> None:
        self._masks = masks

    def masks(self) -> list[Tensor]:
        """Return the masks: True where a weight is updated."""
        return self._masks

    def apply_(
        self,
        targets: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
    ) -> None:
        """Set the targets to 0, in place, where conserved, and copy each weight to ``saved``.

        NaN and infinity become 0 too. An entry that is None is left out.
        """
        for mask, target, weight, copy in zip(self._masks, targets, weights, saved, strict=True):
            if target is not None:
                target.masked_fill_(~mask, 0)
            if weight is not None and copy is not None:
                copy.copy_(weight)

    def conserve_(self, weights: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> None:
        """Put back, in place and bit for bit, the saved value of each weight outside its mask."""
        for mask, weight, old in zip(self._masks, weights, saved, strict=True):
            if weight is not None and old is not None:
                torch.where(mask, weight, old, out=weight)
