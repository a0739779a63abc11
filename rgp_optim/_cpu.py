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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rgp_optim import _reference
from rgp_optim._reference import Entries, update_count

restore_, zero_and_save_ = _reference.restore_, _reference.zero_and_save_

Array = npt.NDArray[Any]
Source = Sequence[tuple[Tensor, float]]  # flat gradients of a tensor and their factors

CHUNK = 1 << 17  # scores per chunk: the buffers stay in the cache
SMALL = 1 << 14  # smaller pools are ranked whole: a sample would not pay
RUN = 8  # neighbours sampled together: half a cache line
SAMPLE = 2.0  # sample size = (SAMPLE * n) ** (2 / 3)
NAN = {4: 0x7F800001, 8: 0x7FF0000000000001}  # key of every NaN, above infinity's, by itemsize
WIDTH = 4.0  # half the bracket, in standard deviations of the sample's count


def select(entries: Entries) -> list[Tensor]:
    """Score and select; see `_reference.select`."""
    with np.errstate(all="ignore"):  # infinite and NaN gradients are legitimate
        return _reference.select(entries, pool_mask)


def pool_mask(entries: Entries) -> Tensor:
    """Score and select in one pool, in rare cases with the reference; see there."""
    pool = [[(g.reshape(-1), factor) for g, factor in each.terms] for each in entries]
    flats, fraction = [source[0][0] for source in pool], entries[0].fraction
    size, given = sum(flat.numel() for flat in flats), entries[0].alpha is None
    k, dtypes = update_count(size, fraction), {flat.dtype for flat in flats}
    rare = k == 0 or fraction == 1.0 or (len(dtypes) > 1 and torch.float64 in dtypes)
    if rare or (given and any(s.itemsize < 2 or bool((s < 0).any()) for s in flats)):  # float8
        return _reference.pool_mask(entries)
    return torch.from_numpy(_bracketed(pool, size, k))


def _bracketed(pool: Sequence[Source], size: int, k: int) -> Array:
    """Return a flat mask of the k highest scores of a pool, its tensors one after another."""
    if size < SMALL:
        return _highest(_keys(pool), k)
    low, high = _bracket(pool, size, k)
    mask = np.empty(size, bool)
    chunk = -(-min(size, CHUNK) // 8) * 8
    (work, spare), inner = _empty_keys(pool, chunk), np.empty(chunk, bool)
    places, inside = [], []
    start = above = 0
    for source in pool:
        chunks = ([(part, factor) for part in torch.split(flat, chunk)] for flat, factor in source)
        for parts in zip(*chunks, strict=True):
            keys = work[: parts[0][0].numel()]
            _write_keys(parts, keys, spare)
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
    if missing < 0 or (missing > keys.size and low > 1):  # the bracket missed
        return _highest(_keys(pool), k)
    if missing > 0 and keys.size:
        mask[np.concatenate(places)] = _highest(keys, missing)
    return mask


def _bracket(pool: Sequence[Source], size: int, k: int) -> tuple[int, int]:
    """Return two keys between which the k-th highest almost surely lies."""
    sample: list[Source] = []
    for source in pool:
        runs = _runs(source[0][0].numel() // RUN, min(1.0, (SAMPLE * size) ** (2 / 3) / size))
        rows = [(flat[: flat.numel() // RUN * RUN].view(-1, RUN), f) for flat, f in source]
        sample.append([(row.index_select(0, runs).view(-1), factor) for row, factor in rows])
    keys = _keys(sample)
    n, nan = keys.size, NAN[keys.itemsize]
    rank, spread = n * (1 - k / size), (n * k * (size - k)) ** 0.5 / size
    low, high = int(rank - WIDTH * spread) - RUN, int(rank + WIDTH * spread) + RUN
    if inner := [i for i in (low, high) if 0 <= i < n]:
        np.minimum(keys, nan, out=keys).partition(inner)
    lowest = int(keys[low]) if low >= 0 else 0
    highest = int(keys[high]) if high < n else nan
    return max(lowest, 1), highest if highest < nan else np.iinfo(keys.dtype).max


@lru_cache(maxsize=256)
def _runs(total: int, share: float) -> Tensor:
    """Return indices of sampled runs, one per stratum: a fixed stride would follow the channels."""
    count = round(total * share)
    edges = np.arange(count + 1, dtype=np.int64) * total // max(1, count)
    return torch.from_numpy(np.random.default_rng(total).integers(edges[:-1], edges[1:]))


def _empty_keys(pool: Sequence[Source], size: int) -> tuple[Array, Array]:
    """Return memory for keys of a pool and for one term of its scores."""
    key = np.int64 if pool[0][0][0].dtype == torch.float64 else np.int32
    return np.empty(size, key), np.empty(size, key)


def _keys(pool: Sequence[Source]) -> Array:
    keys, spare = _empty_keys(pool, sum(source[0][0].numel() for source in pool))
    start = 0
    for source in pool:
        stop = start + source[0][0].numel()
        _write_keys(source, keys[start:stop], spare)
        start = stop
    return keys


def _write_keys(source: Source, keys: Array, spare: Array) -> None:
    """Write the keys of scores: the sum of factor * |gradient|, each step rounded."""
    for i, (flat, factor) in enumerate(source):
        gradient = (flat if flat.itemsize > 2 else flat.float()).numpy()
        out = (spare[: keys.size] if i else keys).view(gradient.dtype)
        if factor != 1.0:
            gradient = np.multiply(gradient, factor, out=out)
        np.absolute(gradient, out=out)
    if i:
        score = keys.view(gradient.dtype)
        np.add(score, out, out=score)


def _highest(keys: Array, k: int) -> Array:
    """Return a mask of the k highest keys, without the key 0; ties go to the first."""
    np.minimum(keys, NAN[keys.itemsize], out=keys)
    rank = max(keys.size - k, 0)
    threshold = np.partition(keys, rank)[rank]
    mask: Array = keys >= max(threshold, 1)
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
