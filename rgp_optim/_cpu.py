"""Score and select on a CPU in NumPy: a sampled bracket, one pass, an exact rest.

A jittered sample of the scores brackets the threshold. One pass over the gradients computes the
scores, marks those above the bracket and collects those inside, a few percent, of which the
highest are selected. Exact counts show a bracket that missed; it costs time, never exactness.
Scores are compared as integers, their keys: the bits of a float >= 0 rank like the float.

Reference: Floyd and Rivest, Expected time bounds for selection, CACM 1975.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rgp_optim import _reference
from rgp_optim._reference import restore_, update_count, zero_and_save_

__all__ = ["restore_", "select", "topk_masks", "zero_and_save_"]

Array = npt.NDArray[Any]
Terms = list[tuple[Tensor, float]]  # flat gradients of one parameter, and their factors

CHUNK = 1 << 17  # scores per chunk: the buffers stay in the cache
SMALL = 1 << 14  # smaller pools are ranked whole: a sample would not pay
RUN = 8  # neighbours sampled together: half a cache line
SAMPLE = 2.0  # sample size = (SAMPLE * n) ** (2 / 3)
WIDTH = 4.0  # half the bracket, in standard deviations of the sample's count


class _Kind(NamedTuple):
    """How scores of one dtype become keys."""

    score: type
    key: type
    nan: int  # the key of every NaN, right above infinity
    highest: int
    floor: int = 1  # lowest key to select: 1 leaves out scores of 0; signed scores have no floor


_NARROW = _Kind(np.float32, np.int32, 0x7F800001, 2**31 - 1)
_WIDE = _Kind(np.float64, np.int64, 0x7FF0000000000001, 2**63 - 1)


def topk_masks(
    scores: Sequence[Tensor], fractions: Sequence[float], pools: Sequence[int]
) -> list[Tensor]:
    """Select by given scores of any sign; see `_reference.topk_masks`."""
    if len(wide := {score.dtype == torch.float64 for score in scores}) > 1:
        return _reference.topk_masks(scores, fractions, pools)
    kind = _WIDE if True in wide else _NARROW
    kind = kind._replace(floor=-kind.highest - 1)
    terms = [[(score.detach().reshape(-1), 1.0)] for score in scores]
    masks = _select(terms, [score.shape for score in scores], fractions, pools, kind)
    for score, mask, fraction in zip(scores, masks, fractions, strict=True):
        if fraction != 1.0:
            mask.logical_and_(score.detach() != 0)
    return masks


def select(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    pools: Sequence[int],
) -> list[Tensor]:
    """Score and select; see `_reference.select`."""
    terms: list[Terms] = []
    shapes, wide = [], set()
    for g_nat, g_adv, alpha in zip(g_nats, g_advs, alphas, strict=True):
        shares = ((g_nat, float(alpha)), (g_adv, 1.0 - float(alpha)))
        present = [(g.detach(), share) for g, share in shares if g is not None]
        some = present[0][0]
        found = [(g.reshape(-1), share) for g, share in present if share != 0.0]
        terms.append(found or [(torch.zeros_like(some).reshape(-1), 1.0)])
        shapes.append(some.shape)
        wide.add(some.dtype == torch.float64)
    if len(wide) > 1:
        return _reference.select(g_nats, g_advs, alphas, fractions, pools)
    return _select(terms, shapes, fractions, pools, _WIDE if True in wide else _NARROW)


def _select(
    terms: Sequence[Terms],
    shapes: Sequence[torch.Size],
    fractions: Sequence[float],
    pools: Sequence[int],
    kind: _Kind,
) -> list[Tensor]:
    """Return one mask per tensor; tensors with equal pool numbers share one threshold."""
    members: dict[int, list[int]] = {}
    for i, pool in enumerate(pools):
        members.setdefault(pool, []).append(i)
    masks: dict[int, Tensor] = {}
    with np.errstate(all="ignore"):  # infinite and NaN gradients are legitimate
        for indices in members.values():
            sizes = [shapes[i].numel() for i in indices]
            size, fraction = sum(sizes), fractions[indices[0]]
            k = update_count(size, fraction)
            if fraction == 1.0 or k == 0:
                mask = torch.from_numpy(np.full(size, k > 0))
            else:
                mask = torch.from_numpy(_pool_mask([terms[i] for i in indices], size, k, kind))
            parts = mask.split(sizes) if len(sizes) > 1 else [mask]
            masks.update((i, part.view(shapes[i])) for i, part in zip(indices, parts, strict=True))
    return [masks[i] for i in range(len(terms))]


def _pool_mask(pool: Sequence[Terms], size: int, k: int, kind: _Kind) -> Array:
    """Return a flat mask of the k highest scores of a pool, its tensors one after another."""
    if size < SMALL:
        return _highest(_keys(pool, size, kind), k, kind)
    low, high = _bracket(pool, size, k, kind)
    mask = np.empty(size, bool)
    chunk = -(-min(size, CHUNK) // 8) * 8
    work, inner = np.empty((2, chunk), kind.key), np.empty(chunk, bool)
    places, inside = [], []
    start = above = 0
    for terms in pool:
        for parts in zip(*(flat.split(chunk) for flat, _ in terms), strict=True):
            keys = work[0, : parts[0].numel()]
            pairs = [(part, share) for part, (_, share) in zip(parts, terms, strict=True)]
            _write_keys(pairs, keys, work[1], kind)
            marks, between = mask[start : start + keys.size], inner[: keys.size]
            np.greater(keys, high, out=marks)
            np.greater_equal(keys, low, out=between)
            np.not_equal(between, marks, out=between)
            inner[keys.size :] = False
            at = _sparse_nonzero(inner)
            above += int(np.count_nonzero(marks))
            inside.append(keys.take(at))
            places.append(at + start)
            start += keys.size
    missing, keys = k - above, np.concatenate(inside)
    if missing < 0 or (missing > keys.size and low > kind.floor):  # the bracket missed
        return _highest(_keys(pool, size, kind), k, kind)
    if missing > 0 and keys.size:
        mask[np.concatenate(places)] = _highest(keys, missing, kind)
    return mask


def _bracket(pool: Sequence[Terms], size: int, k: int, kind: _Kind) -> tuple[int, int]:
    """Return two keys between which the k-th highest almost surely lies."""
    picked, count = [], 0
    for terms in pool:
        whole = terms[0][0].numel() // RUN
        runs = _runs(whole, min(1.0, (SAMPLE * size) ** (2 / 3) / size))
        rows = [(flat[: whole * RUN].view(-1, RUN)[runs], share) for flat, share in terms]
        picked.append([(row.view(-1), share) for row, share in rows])
        count += runs.numel() * RUN
    keys = np.minimum(_keys(picked, count, kind), kind.nan)
    rank, spread = count * (1 - k / size), (count * k * (size - k)) ** 0.5 / size
    low, high = int(rank - WIDTH * spread) - RUN, int(rank + WIDTH * spread) + RUN
    keys.partition([i for i in (low, high) if 0 <= i < count] or -1)
    lowest = max(int(keys[low]), kind.floor) if low >= 0 else kind.floor
    highest = int(keys[high]) if high < count else kind.highest
    return lowest, highest if highest < kind.nan else kind.highest  # no NaN is above another


@lru_cache(maxsize=256)
def _runs(total: int, share: float) -> Tensor:
    """Return indices of sampled runs: a random one in each of equal strata.

    A regular stride would resonate with the layout of the weights, which repeats by channel.
    """
    count = round(total * share)
    edges = np.arange(count + 1) * total // max(1, count)
    return torch.from_numpy(np.random.default_rng(total).integers(edges[:-1], edges[1:]))


def _keys(pool: Sequence[Terms], size: int, kind: _Kind) -> Array:
    """Return all keys of a pool."""
    keys, spare = np.empty(size, kind.key), np.empty(size, kind.key)
    start = 0
    for terms in pool:
        stop = start + terms[0][0].numel()
        _write_keys(terms, keys[start:stop], spare, kind)
        start = stop
    return keys


def _write_keys(terms: Terms, keys: Array, spare: Array, kind: _Kind) -> None:
    """Write the keys of a score: of factor * |gradient|, each rounded, or of their rounded sum."""
    score = out = keys.view(kind.score)
    for flat, share in terms:
        gradient = (flat if flat.itemsize > 2 else flat.float()).numpy()
        if kind.floor < 1:  # a signed score
            np.copyto(out, gradient)
            np.copyto(out, np.nan, where=np.isnan(out))
            keys ^= (keys >> (8 * keys.itemsize - 1)) & kind.highest  # mirrors negative ones
        elif share == 1.0:
            np.absolute(gradient, out=out)
        else:
            np.absolute(np.multiply(gradient, share, out=out), out=out)
        if out is not score:
            np.add(score, out, out=score)
        out = spare[: keys.size].view(kind.score)


def _highest(keys: Array, k: int, kind: _Kind) -> Array:
    """Return a mask of the k highest keys, without those below the floor; ties to the first."""
    np.minimum(keys, kind.nan, out=keys)
    rank = max(keys.size - k, 0)
    ranked = keys.copy()
    ranked.partition(rank)
    if (threshold := ranked[rank]) < kind.floor:
        return keys >= kind.floor
    mask: Array = keys >= threshold
    surplus = int(np.count_nonzero(mask)) - k
    if surplus > 0:
        mask[np.flatnonzero(keys == threshold)[-surplus:]] = False
    return mask


def _sparse_nonzero(flags: Array) -> Array:
    """Return np.flatnonzero, faster where few are set: groups of eight first, then their flags."""
    eights = flags.view(np.uint64)
    groups = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights.take(groups).view(np.bool_))
    return groups.take(within >> 3) * 8 + (within & 7)
