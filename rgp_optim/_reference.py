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


def topk_masks(scores: Sequence[Tensor], fractions: Sequence[float], scope: str) -> list[Tensor]:
    """Return one mask for each score; under scope "global" all of them share one threshold."""
    if scope == "tensor":
        return [topk_mask(score, f) for score, f in zip(scores, fractions, strict=True)]
    if not scores:
        return []
    device = scores[0].device
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    joined = torch.cat([score.reshape(-1).to(device, dtype) for score in scores])
    sizes = [score.numel() for score in scores]
    parts = torch.split(topk_mask(joined, fractions[0]), sizes)
    return [
        part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)
    ]


def rgp_topk_masks(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    scope: str,
) -> list[Tensor]:
    """Score and select; see `rgp_score` and `topk_masks`."""
    pairs = zip(g_nats, g_advs, alphas, strict=True)
    return topk_masks([rgp_score(*pair) for pair in pairs], fractions, scope)


def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set to 0, in place, what the masks leave out; NaN and infinity there too."""
    for tensor, mask in zip(tensors, masks, strict=True):
        tensor.masked_fill_(~mask, 0)


def conserve_(weights: Sequence[Tensor], saved: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Put back, in place and bit for bit, the saved value of each weight outside its mask."""
    for weight, old, mask in zip(weights, saved, masks, strict=True):
        weight.copy_(torch.where(mask, weight, old))
