"""Score, select, mask and restore in plain torch: the specification of every backend.

Nothing here checks its arguments; `functional` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Floats = Sequence[float]
Column = Sequence[Tensor | None]  # one entry per parameter


def update_count(n: int, update_fraction: float) -> int:
    """Return k, the number of weights updated out of ``n``: max(1, round(update_fraction * n))."""
    if n == 0 or update_fraction == 0.0:
        return 0
    return max(1, round(update_fraction * n))


def score_dtype(gradient: Tensor) -> torch.dtype:
    """Return float64 for float64 gradients, float32 for all others."""
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32


def rgp_score(g_nat: Tensor | None, g_adv: Tensor | None, alpha: float) -> Tensor:
    """Return alpha * |g_nat| + (1 - alpha) * |g_adv|; a missing gradient counts as 0.

    Two products and one sum, each rounded: no fused multiply-add, so that all backends agree. A
    factor of 0 leaves its term out, so that an infinite gradient there gives no NaN.
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
    """Return a mask of the k highest scores, without zeros; ties go to the lowest index.

    NaN ranks above infinity, all NaN alike. 1 selects everything, zeros included; 0 nothing.
    """
    if update_fraction == 1.0:
        return torch.ones(score.shape, dtype=torch.bool, device=score.device)
    flat = score.reshape(-1)
    ranked = torch.where(flat.isnan(), math.nan, flat)  # one NaN: sorts may rank their payloads
    order = torch.sort(ranked, descending=True, stable=True).indices
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask.index_fill_(0, order[: update_count(flat.numel(), update_fraction)], True)
    return (mask & (flat != 0)).view(score.shape)


def by_pool(pools: Sequence[int]) -> list[list[int]]:
    """Return the positions of each pool's members."""
    members: dict[int, list[int]] = {}
    for i, pool in enumerate(pools):
        members.setdefault(pool, []).append(i)
    return list(members.values())


def topk_masks(scores: Tensors, fractions: Floats, pools: Sequence[int]) -> list[Tensor]:
    """Return one mask per score; scores with equal pool numbers share one threshold."""
    masks: dict[int, Tensor] = {}
    for indices in by_pool(pools):
        parts = [scores[i] for i in indices]
        joined = torch.cat([score.reshape(-1).to(score_dtype(score)) for score in parts])
        mask = topk_mask(joined, fractions[indices[0]])
        pieces = torch.split(mask, [score.numel() for score in parts])
        for i, score, piece in zip(indices, parts, pieces, strict=True):
            masks[i] = piece.view(score.shape)
    return [masks[i] for i in range(len(scores))]


def select(
    g_nats: Column, g_advs: Column, alphas: Floats, fractions: Floats, pools: Sequence[int]
) -> list[Tensor]:
    """Score and select; see `rgp_score` and `topk_masks`."""
    pairs = zip(g_nats, g_advs, alphas, strict=True)
    return topk_masks([rgp_score(*pair) for pair in pairs], fractions, pools)


def zero_and_save_(masks: Tensors, gradients: Column, weights: Column) -> list[Tensor | None]:
    """Zero each gradient outside its mask, in place, NaN and infinity too; copy each weight."""
    for mask, gradient in zip(masks, gradients, strict=True):
        if gradient is not None:
            gradient.masked_fill_(~mask, 0)
    return [None if weight is None else weight.clone() for weight in weights]


def restore_(masks: Tensors, weights: Tensors, saved: Column) -> None:
    """Put back the saved value of each weight outside its mask, in place and bit for bit."""
    for mask, weight, old in zip(masks, weights, saved, strict=True):
        if old is not None:
            torch.where(mask, weight, old, out=weight)
