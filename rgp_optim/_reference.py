"""Score, select, mask and restore in plain torch: the specification of every backend.

Nothing here checks its arguments; `functional` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

Entries = Sequence["Entry"]
Masking = tuple[Tensor, Tensor | None, Tensor | None]  # mask, gradient, weight
Restoring = tuple[Tensor, Tensor, Tensor]  # mask, weight, saved weight


class Entry(NamedTuple):
    """A tensor to select in, by its two gradients or by given scores; one kind in a call."""

    natural: Tensor | None
    adversarial: Tensor | None
    alpha: float | None  # None: `natural` has the scores, of any sign
    fraction: float
    pool: Hashable = 0  # entries with equal ones share a threshold

    @property
    def present(self) -> Tensor:
        """A tensor that is there; all have one shape, dtype and device."""
        return self.natural if self.natural is not None else cast(Tensor, self.adversarial)

    @property
    def terms(self) -> list[tuple[Tensor, float]]:
        """The gradients that count, one or two, and their factors; the scores and 1.

        A missing gradient counts as 0; a factor of 0 leaves out its term, infinite or not.
        """
        alpha = 1.0 if self.alpha is None else float(self.alpha)
        pairs = (self.natural, alpha), (self.adversarial, 1.0 - alpha)
        terms = [(g, factor) for g, factor in pairs if g is not None and factor != 0.0]
        return terms or [(torch.zeros_like(self.present), 1.0)]


def update_count(n: int, update_fraction: float) -> int:
    """Return k, the number of weights updated out of ``n``: max(1, round(update_fraction * n))."""
    return max(1, round(update_fraction * n)) if n and update_fraction else 0


def score_dtype(gradient: Tensor) -> torch.dtype:
    """Return float64 for float64 gradients, float32 for all others."""
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32


def rgp_score(g_nat: Tensor | None, g_adv: Tensor | None, alpha: float) -> Tensor:
    """Return alpha * |g_nat| + (1 - alpha) * |g_adv|; see `Entry.terms`.

    Two products and one sum, each rounded: no fused multiply-add, so that all backends agree.
    """
    terms = Entry(g_nat, g_adv, alpha, 1.0).terms
    scores = [g.abs().to(score_dtype(g)) * factor for g, factor in terms]
    return scores[0] if len(scores) == 1 else scores[0] + scores[1]


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


def by_pool(pools: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of each pool's members."""
    members: dict[Hashable, list[int]] = {}
    for i, pool in enumerate(pools):
        members.setdefault(pool, []).append(i)
    return list(members.values())


def pool_mask(entries: Entries) -> Tensor:
    """Score and select in one pool; return its masks one after another, flat."""
    scores = [e.present if e.alpha is None else rgp_score(*e[:2], e.alpha) for e in entries]
    joined = torch.cat([score.reshape(-1).to(score_dtype(score)) for score in scores])
    return topk_mask(joined, entries[0].fraction)


def select(entries: Entries, pool_mask: Callable[[Entries], Tensor] = pool_mask) -> list[Tensor]:
    """Return one mask per entry, cut from the masks of the pools."""
    masks: dict[int, Tensor] = {}
    for indices in by_pool([each.pool for each in entries]):
        members = [entries[i] for i in indices]
        mask, shapes = pool_mask(members), [each.present.shape for each in members]
        parts = mask.split_with_sizes([s.numel() for s in shapes]) if len(shapes) > 1 else [mask]
        masks |= zip(indices, map(torch.reshape, parts, shapes), strict=True)
    return [masks[i] for i in range(len(entries))]


def zero_and_save_(rows: Sequence[Masking]) -> list[Tensor | None]:
    """Zero each gradient outside its mask, in place, NaN and infinity too; copy each weight."""
    for mask, gradient, _ in rows:
        if gradient is not None:
            gradient.masked_fill_(~mask, 0)
    return [None if weight is None else weight.clone() for _, _, weight in rows]


def restore_(rows: Sequence[Restoring]) -> None:
    """Put back the saved value of each weight outside its mask, in place and bit for bit."""
    for mask, weight, saved in rows:
        torch.where(mask, weight, saved, out=weight)
