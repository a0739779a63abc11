"""The fast CPU backend: a sampled bracket, one pass over the gradients, and the rest exactly.

A jittered sample of the scores brackets the threshold. One pass marks what lies above the bracket
and collects what lies inside, a few percent; the k-th highest is found among those. A bracket that
missed is noticed by the exact counts and costs time, never exactness. The idea is that of Floyd and
Rivest (1975).

Scores are compared as integers, the *keys*: the bits of a float >= 0 rank like the float, and NaN
ranks above infinity. A pool is what shares one threshold: a tensor, or all of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim uses it: imports no compiler

from rgp_optim import _reference
from rgp_optim._reference import rgp_score, update_count

__all__ = ["Selection", "rgp_score", "select", "topk_masks"]

Array = npt.NDArray[Any]

CHUNK = 1 << 17  # scores at a time: their buffers stay in the cache
GRAIN = 1 << 15  # torch keeps to one thread for so many elements
SMALL = 16384  # from here on a sample pays
SMALLER = 1024
RUN = 8  # neighbours that are sampled together: what one cache line brings
SAMPLE = 2.0  # the sample grows as (SAMPLE * n) ** (2 / 3); with it the cost is least
WIDTH = 4.0  # half the bracket, in standard deviations of the sample's count
THREADED = 1 << 19  # weights; below that a second thread costs more than it brings


@dataclass(frozen=True)
class _Kind:
    """Scores of one dtype and their keys."""

    score: type
    key: type
    lowest: int
    highest: int
    nan: int  # one key for all NaN, right above infinity


_ALL = slice(None)
_KINDS = {
    torch.float32: _Kind(np.float32, np.int32, -(2**31), 2**31 - 1, 0x7F800001),
    torch.float64: _Kind(np.float64, np.int64, -(2**63), 2**63 - 1, 0x7FF0000000000001),
}


# What is ranked: two gradients, or scores. Each reads keys, a chunk at a time.


Part = slice | Tensor  # of a flat tensor: a range, or numbers of runs of RUN


class _Source(Protocol):
    size: int
    kind: _Kind
    floor: int  # no key below it is ever selected

    def read(self, part: Part, keys: Array) -> None:
        """Write the keys of ``part`` to ``keys``."""


class _Gradients:
    """alpha * |g_nat| + (1 - alpha) * |g_adv|, as `_reference.rgp_score` rounds it."""

    floor = 1  # a score of 0

    def __init__(self, g_nat: Tensor | None, g_adv: Tensor | None, alpha: float) -> None:
        some = g_adv if g_nat is None else g_nat
        assert some is not None
        self.size = some.numel()
        self.kind = _KINDS[_reference.score_dtype(some)]
        self._terms: list[tuple[_Flat, float]] = []
        if g_nat is not None and alpha != 0.0:
            self._terms.append((_Flat(g_nat), alpha))
        if g_adv is not None and alpha != 1.0:
            self._terms.append((_Flat(g_adv), 1.0 - alpha))

    def read(self, part: Part, keys: Array) -> None:
        if not self._terms:
            keys.fill(0)
            return
        score: Array = keys.view(self.kind.score)
        self._read_term(0, part, score)
        if len(self._terms) == 2:
            other = _BUFFERS.get("term", self.kind.score, score.size)
            self._read_term(1, part, other)
            np.add(score, other, out=score)

    def _read_term(self, i: int, part: Part, out: Array) -> None:
        gradient, share = self._terms[i]
        if share == 1.0:
            np.absolute(gradient.read(part), out=out)
        else:
            np.multiply(gradient.read(part), share, out=out)
            np.absolute(out, out=out)


class _Scores:
    """Scores of any sign; negative ones are mirrored, so that they rank like floats."""

    def __init__(self, score: Tensor) -> None:
        dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
        self.size = score.numel()
        self.kind = _KINDS[dtype]
        self.floor = self.kind.lowest
        self._flat = _Flat(score)

    def read(self, part: Part, keys: Array) -> None:
        score: Array = keys.view(self.kind.score)
        np.copyto(score, self._flat.read(part))
        if np.isnan(score).any():
            score[np.isnan(score)] = np.nan
        sign = keys >> (keys.itemsize * 8 - 1)
        np.bitwise_xor(keys, sign & self.kind.highest, out=keys)


class _Flat:
    """A tensor's elements in row-major order, given as float32 or float64."""

    def __init__(self, tensor: Tensor) -> None:
        self._flat = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
        self._array = self._flat.numpy().reshape(-1) if tensor.dtype in _KINDS else None

    def read(self, part: Part) -> Array:
        if isinstance(part, slice):
            return (
                _as_float32(self._flat.view(-1)[part]) if self._array is None else self._array[part]
            )
        whole = self._flat.numel() // RUN * RUN
        found = self._flat.view(-1)[:whole].view(-1, RUN).index_select(0, part).view(-1)
        return _as_float32(found) if self._array is None else found.numpy()


def _as_float32(flat: Tensor) -> Array:
    out = torch.from_numpy(_BUFFERS.get("float32", np.float32, flat.numel()))
    for start in range(0, flat.numel(), GRAIN):
        out[start : start + GRAIN].copy_(flat[start : start + GRAIN])
    return out.numpy()


# The selection.


def _small_mask(source: _Gradients, fraction: float, shape: torch.Size) -> Tensor:
    """Select in one small tensor, without a bracket and with little to set up."""
    keys: Array = np.empty(source.size, source.kind.key)
    source.read(_ALL, keys)
    k = update_count(source.size, fraction)
    mask, threshold = _highest(keys, k)
    if threshold > source.kind.nan:  # NaN of several kinds
        mask, _ = _highest(np.minimum(keys, source.kind.nan), k)
    elif threshold < source.floor:
        mask = keys >= source.floor
    return torch.from_numpy(mask).view(shape)


def _sparse_nonzero(flags: Array) -> Array:
    """Do what np.flatnonzero does, faster where few are set: first by eight, then one by one."""
    whole = flags.size // 8 * 8
    eights = flags[:whole].view(np.uint64)
    some = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights.take(some).view(np.bool_))
    at = some.take(within >> 3)
    at <<= 3
    at += within & 7
    rest = np.flatnonzero(flags[whole:])
    return np.concatenate([at, rest + whole]) if rest.size else at


@dataclass
class _Pool:
    """What shares a threshold: sources one after another, of which the k highest are marked."""

    sources: Sequence[_Source]
    marks: Sequence[Array]  # bool, one for each source: the result
    fraction: float
    above: int = 0  # marked so far
    bracket: tuple[int, int] = (0, 0)
    inside: list[tuple[int, Array, Array]] = field(default_factory=list)  # source, position, key

    def __post_init__(self) -> None:
        self.size = sum(source.size for source in self.sources)
        self.k = update_count(self.size, self.fraction)
        self.kind = self.sources[0].kind
        self.floor = self.sources[0].floor

    def prepare(self) -> None:
        """Find the bracket; a small pool is done here."""
        if self.k == 0:
            for mark in self.marks:
                mark.fill(False)
        elif self.size < SMALL:
            self._select_plainly()
        else:
            self.bracket = self._bracket()

    def spans(self) -> list[tuple[int, int, int]]:
        """Return the parts still to be looked at: source, start, stop."""
        if self.k == 0 or self.size < SMALL:
            return []
        return [
            (i, start, min(start + 4 * CHUNK, source.size))
            for i, source in enumerate(self.sources)
            for start in range(0, source.size, 4 * CHUNK)
        ]

    def scan(self, span: tuple[int, int, int]) -> tuple[int, list[tuple[int, Array, Array]]]:
        """Mark what lies above the bracket in ``span``; return how many, and what lies inside."""
        i, first, last = span
        low, high = self.bracket
        source, marks, buffers = self.sources[i], self.marks[i], _BUFFERS
        count = 0
        inside = []
        for start in range(first, last, CHUNK):
            part = slice(start, min(start + CHUNK, last))
            keys = buffers.get("keys", self.kind.key, part.stop - start)
            source.read(part, keys)
            mark = marks[part]
            np.greater(keys, high, out=mark)
            count += int(np.count_nonzero(mark))
            if low <= high:
                candidate = buffers.get("candidate", bool, keys.size)
                np.greater_equal(keys, low, out=candidate)
                np.not_equal(candidate, mark, out=candidate)
                at = _sparse_nonzero(candidate)
                inside.append((i, at + start, keys.take(at)))
        return count, inside

    def finish(self) -> None:
        """Mark what is missing among the candidates, in which the threshold lies."""
        if self.k == 0 or self.size < SMALL:
            return
        missing = self.k - self.above
        found = sum(at.size for _, at, _ in self.inside)
        if missing < 0 or (missing > found and self.bracket[0] > self.floor):
            self._select_plainly()
        elif missing > 0 and found > 0:
            keys = np.concatenate([keys for *_, keys in self.inside])
            chosen, _ = _highest(np.minimum(keys, self.kind.nan, out=keys), missing)
            end = 0
            for i, at, _ in self.inside:
                start, end = end, end + at.size
                self.marks[i][at] = chosen[start:end]
        self.inside.clear()

    def _select_plainly(self) -> None:
        """Rank all keys."""
        keys: Array = np.empty(self.size, self.kind.key)
        end = 0
        for source in self.sources:
            for first in range(0, source.size, CHUNK):
                part = slice(first, min(first + CHUNK, source.size))
                source.read(part, keys[end + part.start : end + part.stop])
            end += source.size
        np.minimum(keys, self.kind.nan, out=keys)
        chosen, _ = _highest(keys, self.k)
        if self.floor > self.kind.lowest:
            chosen &= keys >= self.floor
        end = 0
        for mark in self.marks:
            start, end = end, end + mark.size
            mark[:] = chosen[start:end]

    def _bracket(self) -> tuple[int, int]:
        """Return keys between which the k-th highest almost surely lies."""
        share = min(1.0, (SAMPLE * self.size) ** (2 / 3) / self.size)
        keys = np.concatenate([_sample(source, share) for source in self.sources])
        np.minimum(keys, self.kind.nan, out=keys)
        updated = self.k / self.size
        rank = (1.0 - updated) * keys.size
        half = WIDTH * (keys.size * updated * (1.0 - updated)) ** 0.5 + RUN
        low, high = int(rank - half), int(rank + half)
        inner = [i for i in (low, high) if 0 <= i < keys.size]
        if inner:
            keys.partition(inner)
        lowest = int(keys[low]) if low >= 0 else self.kind.lowest
        highest = int(keys[high]) if high < keys.size else self.kind.highest
        if highest >= self.kind.nan:
            highest = self.kind.highest  # NaN all rank alike, so none of them is above another
        return max(lowest, self.floor), highest


def _highest(keys: Array, k: int) -> tuple[Array, int]:
    """Return a mask of the k highest keys and the lowest key in it; ties go to the first."""
    rank = max(keys.size - k, 0)
    if SMALLER < keys.size <= SMALL:  # numpy's vectorised partition is the slower one here
        threshold = int(torch.from_numpy(keys).kthvalue(rank + 1).values)
    else:
        ranked = keys.copy()
        ranked.partition(rank)
        threshold = int(ranked[rank])
    chosen: Array = keys >= threshold
    surplus = int(np.count_nonzero(chosen)) - k
    if surplus > 0:
        chosen[np.flatnonzero(keys == threshold)[-surplus:]] = False
    return chosen, threshold


def _sample(source: _Source, share: float) -> Array:
    """Return about ``share`` of the keys of a source."""
    runs = _runs(source.size // RUN, share)
    keys: Array = np.empty(runs.numel() * RUN, source.kind.key)
    for start in range(0, runs.numel(), CHUNK // RUN):
        part = runs[start : start + CHUNK // RUN]
        source.read(part, keys[start * RUN :][: part.numel() * RUN])
    return keys


@lru_cache(maxsize=256)
def _runs(total: int, share: float) -> Tensor:
    """Return numbers of runs: one at random in each of equal strata.

    A regular stride would lock onto the layout of the weights, which repeats with the channels.
    """
    draw = np.random.default_rng(total)
    edges = np.arange(round(total * share) + 1) * total // max(1, round(total * share))
    return torch.from_numpy(draw.integers(edges[:-1], edges[1:]))


def select(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    pools: Sequence[int],
) -> Selection:
    """Score and select; what `_reference.select` returns."""
    present = [a if a is not None else b for a, b in zip(g_nats, g_advs, strict=True)]
    plain = [g for g in present if g is not None]
    dtypes = {g.dtype for g in plain}
    if any(d.is_complex for d in dtypes) or (
        len(dtypes) > 1 and _mixed(map(_reference.score_dtype, plain), pools)
    ):
        pairs = zip(g_nats, g_advs, alphas, strict=True)
        scores = [rgp_score(*pair) for pair in pairs]
        return Selection(topk_masks(scores, fractions, pools))
    sources = [_Gradients(*each) for each in zip(g_nats, g_advs, alphas, strict=True)]
    masks: list[Tensor | None] = [None] * len(sources)
    shared = len(set(pools)) < len(pools)
    uses = Counter(pools) if shared else {}
    for i, source in enumerate(sources):
        alone = uses.get(pools[i], 1) == 1 and 0.0 < fractions[i] < 1.0
        if alone and 0 < source.size < SMALL:
            masks[i] = _small_mask(source, fractions[i], plain[i].shape)
    rest = [i for i, mask in enumerate(masks) if mask is None]
    if rest:
        found = _select(
            [sources[i] for i in rest],
            [plain[i].shape for i in rest],
            [fractions[i] for i in rest],
            [pools[i] for i in rest],
        )
        for i, mask in zip(rest, found, strict=True):
            masks[i] = mask
    return Selection([mask for mask in masks if mask is not None])


def topk_masks(
    scores: Sequence[Tensor], fractions: Sequence[float], pools: Sequence[int]
) -> list[Tensor]:
    """Select by given scores; see `_reference.topk_masks`."""
    if _mixed((s.dtype == torch.float64 for s in scores), pools):
        return _reference.topk_masks(scores, fractions, pools)
    masks = _select([_Scores(s) for s in scores], [s.shape for s in scores], fractions, pools)
    for score, mask, fraction in zip(scores, masks, fractions, strict=True):
        if fraction < 1.0:
            mask.logical_and_(score != 0)
    return masks


def _mixed(kinds: Iterable[Any], pools: Sequence[int]) -> bool:
    """Tell whether a pool has keys of two kinds."""
    pairs = set(zip(pools, kinds, strict=True))
    return len(pairs) > len({pool for pool, _ in pairs})


def _select(
    sources: Sequence[_Source],
    shapes: Sequence[torch.Size],
    fractions: Sequence[float],
    numbers: Sequence[int],
) -> list[Tensor]:
    """Mark the highest keys in each pool; return the masks."""
    masks = [torch.empty(shape, dtype=torch.bool, device="cpu") for shape in shapes]
    members: dict[int, list[int]] = {}
    for i, number in enumerate(numbers):
        if fractions[i] == 1.0:
            masks[i].fill_(True)
        else:
            members.setdefault(number, []).append(i)
    pools = [
        _Pool(
            [sources[i] for i in mine],
            [masks[i].view(-1).numpy() for i in mine],
            fractions[mine[0]],
        )
        for mine in members.values()
    ]
    total = sum(pool.size for pool in pools)
    _each(_Pool.prepare, pools, total)
    spans = [(pool, span) for pool in pools for span in pool.spans()]
    for (pool, _), (count, inside) in zip(
        spans, _each(lambda task: task[0].scan(task[1]), spans, total), strict=True
    ):
        pool.above += count
        pool.inside += inside
    _each(_Pool.finish, pools, total)
    return masks


class Selection(_reference.Selection):
    """Masks, applied a chunk at a time with bitwise operations on the numbers' bits."""

    @_disable_dynamo
    def apply_(
        self,
        targets: Sequence[Tensor | None],
        weights: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
    ) -> None:
        for weight, copy in zip(weights, saved, strict=True):
            if weight is not None and copy is not None:
                copy.copy_(weight)
        pairs = zip(self._masks, targets, strict=True)
        work = [(mask, target) for mask, target in pairs if target is not None]
        _each(lambda pair: _zero(*pair), work, sum(mask.numel() for mask, _ in work))

    @_disable_dynamo
    def conserve_(self, weights: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> None:
        triples = zip(self._masks, weights, saved, strict=True)
        work = [(m, w, s) for m, w, s in triples if w is not None and s is not None]
        _each(lambda triple: _put_back(*triple), work, sum(mask.numel() for mask, *_ in work))


def _zero(mask: Tensor, target: Tensor) -> None:
    """Set ``target`` to 0 where it is not in the mask."""
    arrays = _in_memory_order(mask, target)
    if arrays is None:
        target.masked_fill_(~mask, 0)
        return
    marks, bits = arrays
    for part, ones in _ones(marks, bits.dtype):
        np.bitwise_and(bits[part], ones, out=bits[part])


def _put_back(mask: Tensor, weight: Tensor, old: Tensor) -> None:
    """Set ``weight`` to ``old`` where it is not in the mask."""
    arrays = _in_memory_order(mask, weight, old)
    if arrays is None:
        torch.where(mask, weight, old, out=weight)
        return
    marks, new, olds = arrays
    for part, ones in _ones(marks, new.dtype):
        changed = _BUFFERS.get("changed", new.dtype.type, ones.size)
        np.bitwise_xor(new[part], olds[part], out=changed)
        np.bitwise_and(changed, ones, out=changed)
        np.bitwise_xor(olds[part], changed, out=new[part])


def _ones(marks: Array, dtype: Any) -> Iterable[tuple[slice, Array]]:
    """Yield parts of the marks as integers: all bits set, or none."""
    for start in range(0, marks.size, CHUNK):
        part = slice(start, min(start + CHUNK, marks.size))
        ones = _BUFFERS.get("ones", dtype.type, part.stop - start)
        np.negative(marks[part].view(np.int8), out=ones, dtype=dtype)
        yield part, ones


_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _in_memory_order(mask: Tensor, first: Tensor, *others: Tensor) -> list[Array] | None:
    """Return the mask and the bits of tensors with equal strides as flat arrays, or None.

    Without a copy but of the mask, and of that only where the tensors are not in row-major order.
    """
    if any(type(t) is not Tensor for t in (first, *others)):
        return None
    strides = first.stride()
    order = sorted(range(first.dim()), key=lambda d: -strides[d])
    flat = [t.detach().permute(order) for t in (first, *others)]
    if first.is_complex() or not all(t.is_contiguous() for t in flat):
        return None
    ints = [t.view(_INTS[t.element_size()]).reshape(-1).numpy() for t in flat]
    return [mask.permute(order).contiguous().view(-1).numpy(), *ints]


# Buffers and threads.


class _Buffers(threading.local):
    """Memory of a thread that is used again and again."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, type], Array] = {}

    def get(self, name: str, dtype: type, size: int) -> Array:
        """Return an array of that size; its content is what was left there."""
        found = self.held.get((name, dtype))
        if found is None or found.size < size:
            found = self.held[name, dtype] = np.empty(max(size, CHUNK), dtype)
        return found[:size]


_BUFFERS = _Buffers()


def _each(function: Callable[[Any], Any], tasks: Sequence[Any], total: int) -> list[Any]:
    """Map over ``tasks``; on torch's number of threads where there are ``total`` >> 0 weights."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads < 2 or total < THREADED:
        return [function(task) for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, tasks))
