"""Score, exact selection and masking of all tensors of a model in four kernel launches.

What flows where, for each pool of tensors that share a threshold:

1. ``_bracket`` reads a jittered sample of the scores, in registers, and finds a window of scores in
   which the k-th highest almost surely lies. A pool that fits into the registers is done here.
2. ``_count`` reads both gradients once and counts exactly how many scores lie above the window and
   in each of 14 bins of it. The last block to finish finds the bin with the k-th highest. A window
   that missed, or a bin with too many, is noticed there and narrowed by that block: slow, exact.
3. ``_mask`` reads the gradients again, in reverse, while their end is still in the cache. It writes
   one bit for each weight, sets the gradient of what is conserved to 0 and saves the weights. The
   few scores in the bin go to a list; the last block ranks them and corrects their bits.
4. ``_conserve``, after the inner optimizer's step, puts back what is conserved.

Tensors come as a table of addresses, so that their number does not matter. Nothing waits for the
host. Counts are integers and decide everything, so each run gives the same mask. Scores are
compared by their bits, the *keys*: those of floats >= 0 rank like the floats. All kernels round
products and sums one by one (no fused multiply-add), so that they agree with each other and with
`_reference`.

The sampled bracket is that of Floyd and Rivest (1975); the last block that finishes a reduction is
that of AIR Top-K (Zhang et al., SC 2023); tables of addresses are those of apex and of dion.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._compile import _disable_dynamo

from rgp_optim import _reference
from rgp_optim._reference import rgp_score, topk_masks, update_count

__all__ = ["Selection", "rgp_score", "select", "topk_masks"]

ROW = 32  # weights in a word of bits
BLOCK = tl.constexpr(2048)  # weights at a time
MASK_BLOCK = tl.constexpr(1024)  # in `_mask`, which needs more registers for each
SLOW = tl.constexpr(512)  # the same on the ways that are seldom taken: fewer registers
CHUNK = tl.constexpr(15 * 2048)  # weights of a program: 15 fit into a counter of four bits
RUN = tl.constexpr(8)  # neighbours that are sampled together: a sector of memory
SAMPLE = tl.constexpr(16384)  # scores that a program of `_bracket` holds
BINS = tl.constexpr(14)  # of the window; fields 0 and 15 count what is below and above
HALF_WIDTH = 4.5  # half the window, in standard deviations of the sample's count
LIST_SHARE = 128  # one weight in so many has a place in the list,
LIST_LEAST = 1024  # and so many more

NAN = tl.constexpr(0x7F800001)  # one key for all NaN, right above infinity
PASS = tl.constexpr(1 << 40)  # an index above all others

# Columns of the tables. Of a tensor:
T_NUMEL, T_POOL, T_BASE, T_INNER, T_OUTER, T_CODE = (tl.constexpr(i) for i in range(6))
T_WIDTH = tl.constexpr(6)
# of the addresses:
A_NAT, A_ADV, A_TARGET, A_WEIGHT, A_SAVED = (tl.constexpr(i) for i in range(5))
A_WIDTH = tl.constexpr(5)
# of a pool:
P_SIZE, P_K, P_CHUNK, P_CHUNKS, P_RUN, P_RUNS, P_ABOVE, P_BELOW, P_ENOUGH, P_LIST, P_ROOM = (
    tl.constexpr(i) for i in range(11)
)
P_WIDTH = tl.constexpr(11)
# of a pool's state: window, decision (above HIGH: in; LOW..HIGH: by index, or by the list), counts
S_LO, S_HI, S_LOW, S_HIGH, S_BY_LIST, S_LAST, S_MISSING, S_LISTED, S_TICKET, S_TICKET2 = (
    tl.constexpr(i) for i in range(10)
)
S_WIDTH = tl.constexpr(10)

# How each kernel is compiled. Scores are rounded step by step, so that all kernels agree on them.
# The caps on registers keep three or four blocks on an SM; what spills is on ways seldom taken.
OPTIONS: dict[str, dict[str, Any]] = {
    "_bracket": {"num_warps": 32, "enable_fp_fusion": False},
    "_count": {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 64},
    "_mask": {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 80},
    "_use_bits": {"num_warps": 8, "enable_fp_fusion": False},
}
if torch.version.hip is not None:
    for options in OPTIONS.values():
        options.pop("maxnreg", None)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1


# Reading and writing.


@triton.jit
def _load_as(
    address, offsets, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr
):
    p = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    if FULL:
        x = tl.load(p + offsets)
    else:
        x = tl.load(p + offsets, mask=mask, other=0)
    return x


@triton.jit
def _load(
    address, offsets, mask, code, CODE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr
):
    """Load elements of the tensor at ``address`` as float32; 0 outside the mask."""
    if CODE == 0:
        return _load_as(address, offsets, mask, tl.float32, ALIGNED, FULL)
    elif CODE == 1:
        return _load_as(address, offsets, mask, tl.bfloat16, ALIGNED, FULL).to(tl.float32)
    elif CODE == 2:
        return _load_as(address, offsets, mask, tl.float16, ALIGNED, FULL).to(tl.float32)
    else:
        code += tl.zeros(offsets.shape, tl.int64)  # one for each, also where all have the same
        x = _load_as(address, offsets, mask & (code == 0), tl.float32, False, False)
        b = _load_as(address, offsets, mask & (code == 1), tl.bfloat16, False, False)
        h = _load_as(address, offsets, mask & (code == 2), tl.float16, False, False)
        return x + b.to(tl.float32) + h.to(tl.float32)  # two of them are 0


@triton.jit
def _load_bits(
    address, offsets, mask, code, CODE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr
):
    """Load elements as the integers that their bits are."""
    if CODE == 0:
        return _load_as(address, offsets, mask, tl.int32, ALIGNED, FULL)
    elif CODE > 0:
        return _load_as(address, offsets, mask, tl.int16, ALIGNED, FULL).to(tl.int32)
    else:
        code += tl.zeros(offsets.shape, tl.int64)
        wide = _load_as(address, offsets, mask & (code == 0), tl.int32, False, False)
        narrow = _load_as(address, offsets, mask & (code != 0), tl.int16, False, False)
        return tl.where(code == 0, wide, narrow.to(tl.int32))


@triton.jit
def _store_as(
    address, offsets, value, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr
):
    p = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    if FULL:
        tl.store(p + offsets, value.to(DTYPE))
    else:
        tl.store(p + offsets, value.to(DTYPE), mask=mask)


@triton.jit
def _store_bits(
    address,
    offsets,
    value,
    mask,
    code,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store what `_load_bits` has loaded."""
    if CODE == 0:
        _store_as(address, offsets, value, mask, tl.int32, ALIGNED, FULL)
    elif CODE > 0:
        _store_as(address, offsets, value, mask, tl.int16, ALIGNED, FULL)
    else:
        code += tl.zeros(offsets.shape, tl.int64)
        _store_as(address, offsets, value, mask & (code == 0), tl.int32, False, False)
        _store_as(address, offsets, value, mask & (code != 0), tl.int16, False, False)


@triton.jit
def _keys(
    nat,
    adv,
    offsets,
    mask,
    alpha,
    beta,
    code,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return the bits of alpha * |g_nat| + beta * |g_adv|; a gradient at address 0 is left out."""
    score = tl.zeros(offsets.shape, tl.float32)
    if nat != 0:
        score = tl.abs(_load(nat, offsets, mask, code, CODE, ALIGNED, FULL)) * alpha
    if adv != 0:
        score += tl.abs(_load(adv, offsets, mask, code, CODE, ALIGNED, FULL)) * beta
    return tl.minimum(score.to(tl.int32, bitcast=True), NAN)


@triton.jit
def _size(code):
    return tl.where(code == 0, 4, 2).to(tl.int64)


@triton.jit
def _row_major(at, inner, outer):
    """Return the row-major index of what lies at ``at`` in memory.

    Memory order is (N, outer, inner) where row-major order is (N, inner, outer): that of
    channels_last, with inner channels and outer pixels. Contiguous is inner = outer = 1.
    """
    c = at % inner
    q = at // inner
    return ((q // outer) * inner + c) * outer + q % outer


# Counting in 16 fields, and finding the field with the k-th.


@triton.jit
def _fields(acc):
    """Add up counters of four bits, 16 in each int64; returns int64 of shape [16]."""
    every_fourth = 0x000F000F000F000F
    a = tl.sum(acc & every_fourth)
    b = tl.sum((acc >> 4) & every_fourth)
    c = tl.sum((acc >> 8) & every_fourth)
    d = tl.sum((acc >> 12) & every_fourth)
    return _unpack(a, b, c, d, tl.arange(0, 16))


@triton.jit
def _unpack(a, b, c, d, field):
    """Return counters of 16 bits from four words."""
    w = field % 4
    word = tl.where(w == 0, a, tl.where(w == 1, b, tl.where(w == 2, c, d)))
    return (word >> (field // 4 * 16).to(tl.int64)) & 0xFFFF


@triton.jit
def _cross(fields, above, k):
    """Find the field with the k-th highest, counted with ``above`` that are higher than all fields.

    Returns the field (-1 if there are fewer than k), how many are above it, and how many in it.
    """
    f = tl.arange(0, 16)
    higher = tl.sum(tl.where(f[None, :] > f[:, None], fields[None, :], 0), axis=1) + above
    hit = (higher < k) & (k <= higher + fields)
    found = tl.sum(hit.to(tl.int64)) > 0
    field = tl.where(found, tl.sum(tl.where(hit, f.to(tl.int64), 0)), -1)
    return field, tl.sum(tl.where(hit, higher, 0)), tl.sum(tl.where(hit, fields, 0))


@triton.jit
def _first_shift(width):
    """Return the least multiple of 4 by which ``width`` values fit into 16 fields."""
    shift = tl.zeros([], tl.int64)
    while (tl.full([], 16, tl.int64) << shift) < width:
        shift += 4
    return shift


@triton.jit
def _one_in(values, valid, lo, hi, shift):
    """Return counters with a one in the field of each value in lo .. hi, 1 << shift to a field."""
    value = values.to(tl.int64)
    v = value - lo
    inside = valid & (v >= 0) & ((v >> shift) < 16) & (value <= hi)
    field = tl.where(inside, v >> shift, 0)
    return tl.where(inside, tl.full(values.shape, 1, tl.int64) << (4 * field), 0)


@triton.jit
def _rank(values, valid, lo, shift, k, enough):
    """Narrow down the k-th highest of ``values``, from lo .. lo + (16 << shift) - 1.

    Stops when at most ``enough`` values are left, or one distinct value. Returns the lowest value
    of what is left (0 if there are fewer than k values), log2 of its width, how many values are
    above and how many in it.
    """
    above = tl.zeros([], tl.int64)
    inside = tl.full([], 1 << 40, tl.int64)
    width = shift + 4
    while (width > 0) & (inside > enough):
        width -= 4
        field, above, inside = _cross(_fields(_one_in(values, valid, lo, PASS, width)), above, k)
        lo = tl.where(field < 0, 0, lo + (field << width))
        width = tl.where(field < 0, 0, width)
    return lo, width, above, inside


# 1. Sample and bracket.


@triton.jit
def _sampled(row, tensors, run_tensor, run_start):
    """Return tensor, place in it and validity of what a pool's program looks at."""
    i = tl.arange(0, SAMPLE)
    run = i // RUN
    valid = run < tl.load(row + P_RUNS)
    first = tl.load(row + P_RUN)
    t = tl.load(run_tensor + first + run, mask=valid, other=0)
    at = tl.load(run_start + first + run, mask=valid, other=0) + i % RUN
    valid = valid & (at < tl.load(tensors + t * T_WIDTH + T_NUMEL, mask=valid, other=0))
    return t, at, valid


@triton.jit
def _bracket(
    pools,
    tensors,
    shares,
    addresses,
    run_tensor,
    run_start,
    state,
    CODE: tl.constexpr,
):
    pool = tl.program_id(0)
    row = pools + pool * P_WIDTH
    s = state + pool * S_WIDTH
    tl.store(s + S_LISTED, 0)
    tl.store(s + S_TICKET, 0)
    tl.store(s + S_TICKET2, 0)
    tl.store(s + S_BY_LIST, 0)
    k = tl.load(row + P_K)
    size = tl.load(row + P_SIZE)
    if k <= 0:  # -1: all of them, 0: none
        limit = tl.where(k < 0, -1, 0x7FFFFFFF)
        tl.store(s + S_LOW, limit)
        tl.store(s + S_HIGH, limit)
        tl.store(s + S_LAST, -1)
    else:
        t, at, valid = _sampled(row, tensors, run_tensor, run_start)
        code = tl.load(tensors + t * T_WIDTH + T_CODE, mask=valid, other=0)
        nat = tl.load(addresses + t * A_WIDTH + A_NAT, mask=valid, other=0)
        adv = tl.load(addresses + t * A_WIDTH + A_ADV, mask=valid, other=0)
        g_nat = _load(nat, at, valid & (nat != 0), code, CODE, False, False)
        g_adv = _load(adv, at, valid & (adv != 0), code, CODE, False, False)
        score = tl.abs(g_nat) * tl.load(shares + t * 2, mask=valid, other=0.0)
        score = tl.where(nat != 0, score, 0.0)
        term = tl.abs(g_adv) * tl.load(shares + t * 2 + 1, mask=valid, other=0.0)
        score = tl.where(adv != 0, score + term, score)
        keys = tl.minimum(score.to(tl.int32, bitcast=True), NAN)
        one = tl.full([], 1, tl.int64)
        top = tl.full([], 28, tl.int64)
        if tl.load(row + P_CHUNKS) == 0:  # the whole pool is here
            low, _, above, inside = _rank(keys, valid, one, top, k, 0)
            last = tl.full([], -1, tl.int64)
            if (low > 0) & (k - above < inside):
                t, at, _ = _sampled(row, tensors, run_tensor, run_start)  # not kept in registers
                base = tl.load(tensors + t * T_WIDTH + T_BASE, mask=valid, other=0)
                inner = tl.load(tensors + t * T_WIDTH + T_INNER, mask=valid, other=1)
                outer = tl.load(tensors + t * T_WIDTH + T_OUTER, mask=valid, other=1)
                back = size - 1 - (base + _row_major(at, inner, outer))
                tied = valid & (keys == low)
                zero = tl.zeros([], tl.int64)
                back, _, _, _ = _rank(back, tied, zero, _first_shift(size), k - above, 0)
                last = size - 1 - back
            elif low > 0:
                last = tl.full([], PASS, tl.int64)
            tl.store(s + S_LOW, low)
            tl.store(s + S_HIGH, low)
            tl.store(s + S_LAST, last)
        else:
            k_above = tl.load(row + P_ABOVE)
            k_below = tl.load(row + P_BELOW)
            enough = tl.load(row + P_ENOUGH)
            lo = one
            hi = tl.full([], NAN, tl.int64)
            if k_above > 0:
                edge, width, _, _ = _rank(keys, valid, one, top, k_above, enough)
                hi = tl.minimum(edge + (one << width) - 1, NAN)
            if k_below <= size:
                edge, _, _, _ = _rank(keys, valid, one, top, k_below, enough)
                lo = tl.maximum(edge, 1)
            tl.store(s + S_LO, lo)
            tl.store(s + S_HI, tl.maximum(hi, lo + 15))


# 2. Count.


@triton.jit
def _add_chunk(
    acc,
    nat,
    adv,
    left,
    alpha,
    beta,
    code,
    lo,
    hi,
    factor,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Count the keys of a chunk in the fields of the window."""
    i = tl.arange(0, BLOCK)
    for block in range(0, tl.cdiv(left, BLOCK)):
        at = block * BLOCK + i
        mask = at < left
        keys = _keys(nat, adv, at, mask, alpha, beta, code, CODE, ALIGNED, FULL)
        field = tl.umulhi((keys - lo).to(tl.uint32), factor).to(tl.int32) + 1
        field = tl.where(keys < lo, 0, tl.where(keys > hi, BINS + 1, field))
        ones = tl.full([BLOCK], 1, tl.int64) << (4 * field).to(tl.int64)
        if FULL:
            acc += ones
        else:
            acc += tl.where(mask, ones, 0)
    return acc


@triton.jit
def _pool_fields(
    chunk,
    chunks,
    lo,
    hi,
    shift,
    tie,
    size,
    tensors,
    shares,
    addresses,
    chunk_tensor,
    chunk_start,
    CODE: tl.constexpr,
    BY_INDEX: tl.constexpr,
):
    """Count all of a pool in 16 fields: keys, or places of keys that equal ``tie``."""
    fields = tl.zeros([16], tl.int64)
    i = tl.arange(0, SLOW)
    for c in range(chunk, chunk + chunks):
        t = tl.load(chunk_tensor + c).to(tl.int64)
        start = tl.load(chunk_start + c)
        row = tensors + t * T_WIDTH
        code = tl.load(row + T_CODE)
        left = tl.minimum(tl.load(row + T_NUMEL) - start, CHUNK)
        nat = tl.load(addresses + t * A_WIDTH + A_NAT)
        adv = tl.load(addresses + t * A_WIDTH + A_ADV)
        alpha = tl.load(shares + t * 2)
        beta = tl.load(shares + t * 2 + 1)
        for block in range(0, tl.cdiv(left, SLOW)):
            at = start + block * SLOW + i
            mask = at < start + left
            keys = _keys(nat, adv, at, mask, alpha, beta, code, CODE, False, False)
            if BY_INDEX:
                index = _row_major(at, tl.load(row + T_INNER), tl.load(row + T_OUTER))
                back = size - 1 - (tl.load(row + T_BASE) + index)
                acc = _one_in(back, mask & (keys == tie), lo, hi, shift)
            else:
                acc = _one_in(keys, mask, lo, hi, shift)
            fields += _fields(acc)
    return fields


@triton.jit
def _count(
    pools,
    tensors,
    shares,
    addresses,
    chunk_tensor,
    chunk_start,
    counts,
    state,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    c = tl.program_id(0)
    t = tl.load(chunk_tensor + c).to(tl.int64)
    start = tl.load(chunk_start + c)
    code = tl.load(tensors + t * T_WIDTH + T_CODE)
    pool = tl.load(tensors + t * T_WIDTH + T_POOL)
    row = pools + pool * P_WIDTH
    s = state + pool * S_WIDTH
    k = tl.load(row + P_K)
    if k > 0:
        left = tl.minimum(tl.load(tensors + t * T_WIDTH + T_NUMEL) - start, CHUNK).to(tl.int32)
        shift = start * _size(code)
        nat = tl.load(addresses + t * A_WIDTH + A_NAT)
        nat = tl.where(nat == 0, nat, nat + shift)
        adv = tl.load(addresses + t * A_WIDTH + A_ADV)
        adv = tl.where(adv == 0, adv, adv + shift)
        alpha = tl.load(shares + t * 2)
        beta = tl.load(shares + t * 2 + 1)
        lo = tl.load(s + S_LO)
        hi = tl.load(s + S_HI)
        factor = (tl.full([], BINS, tl.int64) << 32) // (hi - lo + 1)
        f32 = factor.to(tl.uint32)
        lo32 = lo.to(tl.int32)
        hi32 = hi.to(tl.int32)
        acc = tl.zeros([BLOCK], tl.int64)
        if left % BLOCK == 0:
            acc = _add_chunk(
                acc, nat, adv, left, alpha, beta, code, lo32, hi32, f32, CODE, ALIGNED, True
            )
        else:
            acc = _add_chunk(
                acc, nat, adv, left, alpha, beta, code, lo32, hi32, f32, CODE, ALIGNED, False
            )
        every_fourth = 0x000F000F000F000F
        tl.store(counts + c * 4, tl.sum(acc & every_fourth))
        tl.store(counts + c * 4 + 1, tl.sum((acc >> 4) & every_fourth))
        tl.store(counts + c * 4 + 2, tl.sum((acc >> 8) & every_fourth))
        tl.store(counts + c * 4 + 3, tl.sum((acc >> 12) & every_fourth))
        tl.debug_barrier()
        ticket = tl.atomic_add(s + S_TICKET, 1, sem="acq_rel")
        chunk = tl.load(row + P_CHUNK)
        chunks = tl.load(row + P_CHUNKS)
        if ticket == chunks - 1:  # all have counted: decide
            f = tl.arange(0, 16)
            fields = tl.zeros([16], tl.int64)
            for first in range(0, chunks, 64):
                n = first + tl.arange(0, 64)
                word = tl.load(
                    counts + (chunk + n)[:, None] * 4 + (f % 4)[None, :],
                    mask=(n < chunks)[:, None],
                    other=0,
                    cache_modifier=".cg",
                )
                word = (word >> (f // 4 * 16).to(tl.int64)[None, :]) & 0xFFFF
                fields += tl.sum(word, axis=0)
            field, above, inside = _cross(fields, tl.zeros([], tl.int64), k)
            one = tl.full([], 1, tl.int64)
            low = one + tl.zeros([], tl.int64)
            high = lo - 1
            if field == BINS + 1:  # the sample misled
                low = hi + 1
                high = tl.full([], NAN, tl.int64)
            elif field > 0:
                low = lo + (((field - 1) << 32) + factor - 1) // factor
                high = tl.where(field == BINS, hi, lo + ((field << 32) + factor - 1) // factor - 1)
            room = tl.load(row + P_ROOM)
            size = tl.load(row + P_SIZE)
            width = _first_shift(high - low + 1) + 4
            # Narrow until it is decided, or few enough to list: seldom any turn at all.
            if (field == 0) | (field == BINS + 1):
                inside = tl.full([], PASS, tl.int64)
            if high < low:  # nothing but zeros is left
                low = tl.zeros([], tl.int64)
                width = tl.zeros([], tl.int64)
                inside = k - above
            while (width > 0) & (inside > room) & (k - above != inside):
                width -= 4
                fields = _pool_fields(
                    chunk,
                    chunks,
                    low,
                    high,
                    width,
                    0,
                    size,
                    tensors,
                    shares,
                    addresses,
                    chunk_tensor,
                    chunk_start,
                    CODE,
                    False,
                )
                field, now_above, inside = _cross(fields, above, k)
                if field < 0:  # fewer than k are not 0: all of those
                    low = tl.zeros([], tl.int64)
                    high = low
                    width = low
                    inside = k - above
                else:
                    above = now_above
                    low = low + (field << width)
                    high = tl.minimum(high, low + (one << width) - 1)
            tl.store(s + S_MISSING, k - above)
            if k - above == inside:  # all that is left, but no zeros
                edge = tl.maximum(low, 1) - 1
                tl.store(s + S_LOW, edge)
                tl.store(s + S_HIGH, edge)
                tl.store(s + S_LAST, -1)
            elif inside <= room:
                tl.store(s + S_LOW, low)
                tl.store(s + S_HIGH, high)
                tl.store(s + S_BY_LIST, 1)
            else:  # one value, more often than there is room: the first of them, by their places
                lowest = tl.zeros([], tl.int64)
                places = _first_shift(size) + 4
                taken = tl.zeros([], tl.int64)
                while places > 0:
                    places -= 4
                    fields = _pool_fields(
                        chunk,
                        chunks,
                        lowest,
                        PASS,
                        places,
                        low,
                        size,
                        tensors,
                        shares,
                        addresses,
                        chunk_tensor,
                        chunk_start,
                        CODE,
                        True,
                    )
                    field, taken, inside = _cross(fields, taken, k - above)
                    lowest = lowest + (field << places)
                tl.store(s + S_LOW, low)
                tl.store(s + S_HIGH, low)
                tl.store(s + S_LAST, size - 1 - lowest)


# 3. Mask.


@triton.jit
def _mask_block(
    nat,
    adv,
    target,
    weight,
    saved,
    at,
    left,
    start,
    row,
    slot,
    words,
    alpha,
    beta,
    code,
    low,
    high,
    by_list,
    last,
    s,
    listed_keys,
    listed_slots,
    room,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    mask = at < left
    keys = _keys(nat, adv, at, mask, alpha, beta, code, CODE, ALIGNED, FULL)
    chosen = mask & (keys > high)
    special = mask & (keys >= low) & (keys <= high)
    waits = special & (by_list != 0)
    if tl.max(tl.max(special.to(tl.int32), 1), 0) > 0:
        if by_list != 0:
            place = tl.atomic_add(
                s + S_LISTED + tl.zeros(at.shape, tl.int64),
                tl.full(at.shape, 1, tl.int64),
                mask=special,
                sem="relaxed",
            )
            fits = special & (place < room)
            tl.store(listed_keys + place, keys, mask=fits)
            tl.store(listed_slots + place, slot + at, mask=fits)
        else:
            index = _row_major(
                start + at.to(tl.int64), tl.load(row + T_INNER), tl.load(row + T_OUTER)
            )
            chosen = chosen | (special & (tl.load(row + T_BASE) + index <= last))
    columns = tl.arange(0, 32)
    tl.store(words, tl.sum(chosen.to(tl.int32) << columns[None, :], axis=1))
    if target != 0:
        bits = _load_bits(target, at, mask, code, CODE, ALIGNED, FULL)
        bits = tl.where(chosen | waits, bits, 0)
        _store_bits(target, at, bits, mask, code, CODE, ALIGNED, FULL)
    if saved != 0:
        bits = _load_bits(weight, at, mask, code, CODE, ALIGNED, FULL)
        _store_bits(saved, at, bits, mask, code, CODE, ALIGNED, FULL)


@triton.jit
def _mask(
    pools,
    tensors,
    shares,
    addresses,
    chunk_tensor,
    chunk_start,
    list_keys,
    list_slots,
    state,
    bits,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    c = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    t = tl.load(chunk_tensor + c).to(tl.int64)
    start = tl.load(chunk_start + c)
    row = tensors + t * T_WIDTH
    code = tl.load(row + T_CODE)
    pool = tl.load(row + T_POOL)
    s = state + pool * S_WIDTH
    left = tl.minimum(tl.load(row + T_NUMEL) - start, CHUNK).to(tl.int32)
    shift = start * _size(code)
    a = addresses + t * A_WIDTH
    nat = tl.load(a + A_NAT)
    nat = tl.where(nat == 0, nat, nat + shift)
    adv = tl.load(a + A_ADV)
    adv = tl.where(adv == 0, adv, adv + shift)
    target = tl.load(a + A_TARGET)
    target = tl.where(target == 0, target, target + shift)
    weight = tl.load(a + A_WEIGHT) + shift
    saved = tl.load(a + A_SAVED)
    saved = tl.where(saved == 0, saved, saved + shift)
    alpha = tl.load(shares + t * 2)
    beta = tl.load(shares + t * 2 + 1)
    low = tl.load(s + S_LOW).to(tl.int32)
    high = tl.load(s + S_HIGH).to(tl.int32)
    by_list = tl.load(s + S_BY_LIST)
    last = tl.load(s + S_LAST)
    place = tl.load(pools + pool * P_WIDTH + P_LIST)
    room = tl.load(pools + pool * P_WIDTH + P_ROOM)
    rows = tl.arange(0, MASK_BLOCK // 32)
    inside = rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    slot = c * CHUNK
    for block in range(0, tl.cdiv(left, MASK_BLOCK)):
        at = block * MASK_BLOCK + inside
        words = bits + slot // 32 + block * (MASK_BLOCK // 32) + rows
        if (block + 1) * MASK_BLOCK <= left:
            _mask_block(
                nat, adv, target, weight, saved, at, left, start, row, slot, words, alpha, beta,
                code, low, high, by_list, last, s, list_keys + place, list_slots + place, room,
                CODE, ALIGNED, True,
            )  # fmt: skip
        else:
            _mask_block(
                nat, adv, target, weight, saved, at, left, start, row, slot, words, alpha, beta,
                code, low, high, by_list, last, s, list_keys + place, list_slots + place, room,
                CODE, ALIGNED, False,
            )  # fmt: skip
    if by_list != 0:
        tl.debug_barrier()
        ticket = tl.atomic_add(s + S_TICKET2, 1, sem="acq_rel")
        if ticket == tl.load(pools + pool * P_WIDTH + P_CHUNKS) - 1:
            _resolve(
                pools + pool * P_WIDTH, tensors, addresses, chunk_tensor, chunk_start,
                list_keys + place, list_slots + place, s, bits, CODE,
            )  # fmt: skip


@triton.jit
def _listed_index(slots, mask, tensors, chunk_tensor, chunk_start):
    """Return tensor, place in its memory and row-major index in its pool of listed weights."""
    c = slots // CHUNK
    t = tl.load(chunk_tensor + c, mask=mask, other=0).to(tl.int64)
    at = tl.load(chunk_start + c, mask=mask, other=0) + slots % CHUNK
    row = tensors + t * T_WIDTH
    index = _row_major(
        at,
        tl.load(row + T_INNER, mask=mask, other=1),
        tl.load(row + T_OUTER, mask=mask, other=1),
    )
    return t, at, tl.load(row + T_BASE, mask=mask, other=0) + index


@triton.jit
def _resolve(
    row,
    tensors,
    addresses,
    chunk_tensor,
    chunk_start,
    list_keys,
    list_slots,
    s,
    bits,
    CODE: tl.constexpr,
):
    """Rank what was listed; set the bits of the highest, and the other targets to 0."""
    count = tl.load(s + S_LISTED, cache_modifier=".cg")
    missing = tl.load(s + S_MISSING)
    size = tl.load(row + P_SIZE)
    i = tl.arange(0, SLOW)
    low = tl.load(s + S_LOW)
    width = _first_shift(tl.load(s + S_HIGH) - low + 1) + 4
    above = tl.zeros([], tl.int64)
    inside = count
    while width > 0:
        width -= 4
        fields = tl.zeros([16], tl.int64)
        for first in range(0, count, SLOW):
            mask = first + i < count
            keys = tl.load(list_keys + first + i, mask=mask, other=0, cache_modifier=".cg")
            fields += _fields(_one_in(keys, mask, low, PASS, width))
        field, above, inside = _cross(fields, above, missing)
        low += field << width
    last = tl.full([], PASS, tl.int64)
    if missing - above < inside:  # ties: the first of them
        lowest = tl.zeros([], tl.int64)
        taken = tl.zeros([], tl.int64)
        width = _first_shift(size) + 4
        while width > 0:
            width -= 4
            fields = tl.zeros([16], tl.int64)
            for first in range(0, count, SLOW):
                mask = first + i < count
                keys = tl.load(list_keys + first + i, mask=mask, other=0, cache_modifier=".cg")
                mask = mask & (keys == low)
                slots = tl.load(list_slots + first + i, mask=mask, other=0, cache_modifier=".cg")
                t, at, index = _listed_index(slots, mask, tensors, chunk_tensor, chunk_start)
                fields += _fields(_one_in(size - 1 - index, mask, lowest, PASS, width))
            field, taken, inside = _cross(fields, taken, missing - above)
            lowest += field << width
        last = size - 1 - lowest
    for first in range(0, count, SLOW):
        mask = first + i < count
        keys = tl.load(list_keys + first + i, mask=mask, other=0, cache_modifier=".cg")
        slots = tl.load(list_slots + first + i, mask=mask, other=0, cache_modifier=".cg")
        t, at, index = _listed_index(slots, mask, tensors, chunk_tensor, chunk_start)
        chosen = mask & ((keys > low) | ((keys == low) & (index <= last)))
        bit = tl.full([SLOW], 1, tl.int32) << (slots % 32).to(tl.int32)
        tl.atomic_or(bits + slots // 32, bit, mask=chosen, sem="relaxed")
        target = tl.load(addresses + t * A_WIDTH + A_TARGET, mask=mask, other=0)
        code = tl.load(tensors + t * T_WIDTH + T_CODE, mask=mask, other=0)
        dropped = mask & (chosen == 0) & (target != 0)
        _store_bits(target, at, tl.zeros([SLOW], tl.int32), dropped, code, CODE, False, False)


# 4. What is done with bits that are known.


@triton.jit
def _use_bits(
    tensors,
    addresses,
    chunk_tensor,
    chunk_start,
    bits,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHAT: tl.constexpr,
):
    """Conserve (0): weight = saved where conserved. Mask (1): target = 0 there, saved = weight.

    Expand (2): target = the mask, one byte for each weight.
    """
    c = tl.program_id(0).to(tl.int64)
    t = tl.load(chunk_tensor + c).to(tl.int64)
    start = tl.load(chunk_start + c)
    row = tensors + t * T_WIDTH
    code = tl.load(row + T_CODE)
    left = tl.minimum(tl.load(row + T_NUMEL) - start, CHUNK).to(tl.int32)
    shift = start * _size(code)
    a = addresses + t * A_WIDTH
    target = tl.load(a + A_TARGET)
    weight = tl.load(a + A_WEIGHT) + shift
    saved = tl.load(a + A_SAVED)
    rows = tl.arange(0, BLOCK // 32)
    columns = tl.arange(0, 32)
    inside = rows[:, None] * 32 + columns[None, :]
    for block in range(0, tl.cdiv(left, BLOCK)):
        at = block * BLOCK + inside
        mask = at < left
        words = tl.load(bits + c * (CHUNK // 32) + block * (BLOCK // 32) + rows)
        chosen = ((words[:, None] >> columns[None, :]) & 1) != 0
        if WHAT == 0:
            if saved != 0:
                back = mask & (chosen == 0)
                old = _load_bits(saved + shift, at, back, code, CODE, ALIGNED, False)
                _store_bits(weight, at, old, back, code, CODE, ALIGNED, False)
        elif WHAT == 1:
            if target != 0:
                now = _load_bits(target + shift, at, mask, code, CODE, ALIGNED, False)
                now = tl.where(chosen, now, 0)
                _store_bits(target + shift, at, now, mask, code, CODE, ALIGNED, False)
            if saved != 0:
                now = _load_bits(weight, at, mask, code, CODE, ALIGNED, False)
                _store_bits(saved + shift, at, now, mask, code, CODE, ALIGNED, False)
        else:
            if target != 0:
                p = (target + start).to(tl.pointer_type(tl.int8))
                tl.store(p + at, chosen.to(tl.int8), mask=mask)


# The tables, and what launches the kernels.

HOST = torch.device("cpu")  # named: a program may have another default device
INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
_ALL_K = -1  # P_K of a pool of which everything is selected


def _ints(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    table = torch.tensor(values, dtype=dtype, device=HOST)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


class _Plan:
    """All that does not change from step to step: who is where, and what is sampled."""

    def __init__(
        self,
        sizes: Sequence[int],
        layouts: Sequence[tuple[int, int]],
        dtypes: Sequence[torch.dtype],
        alphas: Sequence[float],
        fractions: Sequence[float],
        pools: Sequence[int],
        device: torch.device,
    ) -> None:
        self.device = device
        self.code = CODES[dtypes[0]] if len(set(dtypes)) == 1 else MIXED
        members: dict[int, list[int]] = {}
        for i, pool in enumerate(pools):
            members.setdefault(pool, []).append(i)
        groups = [_Group([(i, sizes[i]) for i in m], fractions[m[0]]) for m in members.values()]
        groups.sort(key=lambda group: group.whole)  # those that are counted come first
        tensors = [[0] * T_WIDTH.value for _ in sizes]
        chunk_tensor: list[int] = []
        chunk_start: list[int] = []
        run_tensor: list[Tensor] = []
        run_start: list[Tensor] = []
        rows = []
        runs = room = self.counted = 0
        for number, group in enumerate(groups):
            base, first = 0, len(chunk_tensor)
            for i, size in group.members:
                tensors[i] = [size, number, base, *layouts[i], CODES[dtypes[i]]]
                base += size
                starts = range(0, size, CHUNK.value)
                chunk_tensor += [i] * len(starts)
                chunk_start += starts
            chunks = len(chunk_tensor) - first
            sample_tensor, sample_start = group.sample()
            run_tensor.append(sample_tensor)
            run_start.append(sample_start)
            rows.append([
                group.size, group.k, first, 0 if group.whole else chunks, runs,
                len(sample_tensor), *group.ranks(len(sample_tensor) * RUN.value), room, group.room,
            ])  # fmt: skip
            runs += len(sample_tensor)
            room += group.room
            self.counted += 0 if group.whole else chunks
        self.pools, self.chunks, self.room = len(groups), len(chunk_tensor), room
        shares = [[a, 1.0 - a] for a in alphas]
        self.pool_table = _ints(rows, torch.int64, device)
        self.tensor_table = _ints(tensors, torch.int64, device)
        self.share_table = _ints(shares, torch.float32, device)
        self.chunk_tensor = _ints(chunk_tensor, torch.int32, device)
        self.chunk_start = _ints(chunk_start, torch.int64, device)
        self.run_tensor = _ints(torch.cat(run_tensor).tolist(), torch.int32, device)
        self.run_start = _ints(torch.cat(run_start).tolist(), torch.int64, device)
        self._addresses: dict[tuple[int, ...], Tensor] = {}
        self._captured: list[tuple[Tensor, Tensor]] = []  # a graph reads them at each replay
        # Host memory for the tables of a captured step: none can be pinned during the capture.
        words = len(sizes) * A_WIDTH.value
        staged = 32 if device.type == "cuda" else 0
        self._staged = [
            torch.empty(words, dtype=torch.int64, device=HOST).pin_memory() for _ in range(staged)
        ]

    def addresses(self, columns: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """Return the device's table of where the tensors are."""
        flat = tuple(
            0 if t is None else t.data_ptr() for row in zip(*columns, strict=True) for t in row
        )
        if _capturing(self.device):
            return self._upload(flat)
        found = self._addresses.get(flat)
        if found is None:
            if len(self._addresses) >= 16:
                self._addresses.clear()
            found = self._addresses[flat] = self._upload(flat)
            self._note()
        self._wait(found)
        return found

    def _note(self) -> None:
        """Remember when the last table has arrived."""
        if self.device.type == "cuda":
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self.device))

    def _wait(self, table: Tensor) -> None:
        """Let this stream, which need not be the one of the copy, wait for the tables."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._ready)
            table.record_stream(stream)

    def _upload(self, flat: tuple[int, ...]) -> Tensor:
        if not _capturing(self.device):
            return _ints(flat, torch.int64, self.device)
        if not self._staged:
            raise RuntimeError(
                "step() was captured in CUDA graphs too often with the same parameters: its "
                "tables of addresses are used up. Capture it once and replay that graph."
            )
        staged = self._staged.pop()
        staged.copy_(torch.tensor(flat, dtype=torch.int64, device=HOST))
        table = staged.to(self.device, non_blocking=True)
        self._captured.append((staged, table))
        return table


@dataclass
class _Group:
    """Tensors that share a threshold, by number and size."""

    members: list[tuple[int, int]]
    fraction: float

    def __post_init__(self) -> None:
        self.size = sum(size for _, size in self.members)
        self.k = _ALL_K if self.fraction == 1.0 else update_count(self.size, self.fraction)
        runs = sum(-(-size // RUN.value) for _, size in self.members)
        self.whole = self.k <= 0 or runs <= SAMPLE.value // RUN.value
        self.room = 0 if self.whole else self.size // LIST_SHARE + LIST_LEAST

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return tensor and start of each run that is sampled; of a small group, all of them."""
        if self.k <= 0:
            none = torch.zeros(0, dtype=torch.int64, device=HOST)
            return none, none
        numbers = torch.tensor([i for i, _ in self.members], device=HOST)
        sizes = torch.tensor([size for _, size in self.members], device=HOST)
        runs = -(-sizes // RUN.value) if self.whole else sizes // RUN.value
        ends = runs.cumsum(0)
        total = int(ends[-1])
        wanted = total if self.whole else min(SAMPLE.value // RUN.value, total)
        chosen = torch.arange(wanted, device=HOST)
        if not self.whole:  # one at random in each of equal strata
            edges = torch.arange(wanted + 1, device=HOST) * total // wanted
            generator = torch.Generator(HOST).manual_seed(total)
            draws = torch.rand(wanted, generator=generator, dtype=torch.float64, device=HOST)
            chosen = edges[:-1] + (draws * edges.diff()).long()
        member = torch.searchsorted(ends, chosen, right=True)
        return numbers[member], (chosen - (ends - runs)[member]) * RUN.value

    def ranks(self, sampled: int) -> tuple[int, int, int]:
        """Return ranks in the sample above and below the k-th, and how exactly to find them."""
        if self.whole:
            return 0, 0, 0
        expected = sampled * self.k / self.size
        half = HALF_WIDTH * (expected * (1 - self.k / self.size)) ** 0.5 + RUN.value
        below = int(expected + half) + 1
        return (
            max(int(expected - half), 0),
            below if below <= sampled else self.size + 1,
            max(1, int(half / 8)),
        )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_plans: OrderedDict[Any, _Plan] = OrderedDict()


def _plan(*key: Any) -> _Plan:
    """Return the plan for these arguments; the last few are kept."""
    found = _plans.pop(key, None)
    if found is None:
        if _capturing(key[-1]):
            raise RuntimeError(
                "A CUDA graph can capture step() only after an eager step with the same "
                "parameters and settings: run a few steps before the capture, as "
                "torch.cuda.graph asks for."
            )
        found = _Plan(*key)
    _plans[key] = found
    while len(_plans) > 8:
        _plans.popitem(last=False)
    return found


@_disable_dynamo
def select(
    g_nats: Sequence[Tensor | None],
    g_advs: Sequence[Tensor | None],
    alphas: Sequence[float],
    fractions: Sequence[float],
    pools: Sequence[int],
) -> Selection:
    """Score and select; what `_reference.select` returns, as bits."""
    pairs, layouts = [], []
    for g_nat, g_adv, alpha in zip(g_nats, g_advs, alphas, strict=True):
        some = g_adv if g_nat is None else g_nat
        assert some is not None
        layout = _layout(some)
        if layout is None or (g_nat is not None and g_adv is not None and not _alike(g_nat, g_adv)):
            g_nat = None if g_nat is None else g_nat.contiguous()
            g_adv = None if g_adv is None else g_adv.contiguous()
            some, layout = some.contiguous(), (1, 1)
        layouts.append(layout)
        pairs.append((some, g_nat if alpha > 0.0 else None, g_adv if alpha < 1.0 else None))
    likes = [some for some, _, _ in pairs]
    plan = _plan(
        tuple(like.numel() for like in likes),
        tuple(layouts),
        tuple(like.dtype for like in likes),
        tuple(alphas),
        tuple(fractions),
        tuple(pools),
        likes[0].device,
    )
    return Selection(plan, likes, [nat for _, nat, _ in pairs], [adv for _, _, adv in pairs])


def _layout(tensor: Tensor) -> tuple[int, int] | None:
    """Return inner and outer of the memory order, as `_row_major` takes them, if it has any."""
    if tensor.is_contiguous():
        return 1, 1
    if tensor.dim() == 2 and tensor.t().is_contiguous():
        return tensor.shape[0], tensor.shape[1]
    if tensor.dim() > 2 and tensor.movedim(1, -1).is_contiguous():
        return tensor.shape[1], tensor[0, 0].numel()
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride()


Column = Sequence[Tensor | None]


class Selection:
    """What was selected; see `_reference.Selection`. One bit for each weight."""

    def __init__(self, plan: _Plan, likes: list[Tensor], nats: Column, advs: Column) -> None:
        self._plan = plan
        self._likes = [(t.shape, t.stride(), t.dtype) for t in likes]
        self._none: list[None] = [None] * len(likes)
        self._gradients: tuple[Column, Column] | None = (nats, advs)
        self._bits = torch.empty(
            plan.chunks * (CHUNK.value // ROW), dtype=torch.int32, device=plan.device
        )
        self._state = torch.empty(plan.pools * S_WIDTH.value, dtype=torch.int64, device=plan.device)
        if plan.chunks == 0:
            return
        addresses = plan.addresses((nats, advs, self._none, self._none, self._none))
        with self._guard():
            _bracket[(plan.pools,)](
                plan.pool_table, plan.tensor_table, plan.share_table, addresses, plan.run_tensor,
                plan.run_start, self._state, CODE=plan.code, **OPTIONS["_bracket"],
            )  # fmt: skip
            if plan.counted:
                counts = torch.empty(plan.counted * 4, dtype=torch.int64, device=plan.device)
                _count[(plan.counted,)](
                    plan.pool_table, plan.tensor_table, plan.share_table, addresses,
                    plan.chunk_tensor, plan.chunk_start, counts, self._state, CODE=plan.code,
                    ALIGNED=_aligned(nats, advs), **OPTIONS["_count"],
                )  # fmt: skip

    @_disable_dynamo
    def masks(self) -> list[Tensor]:
        """Return the masks: True where a weight is updated."""
        self._finish(self._none, self._none, self._none)
        masks = [
            torch.empty_strided(shape, stride, dtype=torch.bool, device=self._plan.device)
            for shape, stride, _ in self._likes
        ]
        self._use_bits(2, masks, self._none, self._none)
        return masks

    @_disable_dynamo
    def apply_(self, targets: Column, weights: Column, saved: Column) -> None:
        """Set the targets to 0, in place, where conserved, and copy each weight to ``saved``."""
        masked = [self._fits(i, target) for i, target in enumerate(targets)]
        kept = [self._fits(i, *pair) for i, pair in enumerate(zip(weights, saved, strict=True))]
        columns = _only(targets, masked), _only(weights, kept), _only(saved, kept)
        if self._gradients is not None:
            self._finish(*columns)
        else:
            self._use_bits(1, *columns)
        if not all(masked + kept):  # in another memory order than their gradients
            self._plainly().apply_(
                _only(targets, masked, False),
                _only(weights, kept, False),
                _only(saved, kept, False),
            )

    @_disable_dynamo
    def conserve_(self, weights: Column, saved: Column) -> None:
        """Put back, in place and bit for bit, the saved value of each weight outside its mask."""
        self._finish(self._none, self._none, self._none)
        kept = [self._fits(i, *pair) for i, pair in enumerate(zip(weights, saved, strict=True))]
        self._use_bits(0, self._none, _only(weights, kept), _only(saved, kept))
        if not all(kept):
            self._plainly().conserve_(_only(weights, kept, False), _only(saved, kept, False))

    def _plainly(self) -> _reference.Selection:
        return _reference.Selection(self.masks())

    def _fits(self, i: int, *tensors: Tensor | None) -> bool:
        """Tell whether tensors lie in memory as the gradients of entry i do, or are missing."""
        if any(t is None for t in tensors):
            return True
        _, stride, dtype = self._likes[i]
        return all(
            t is not None and type(t) is Tensor and t.stride() == stride and t.dtype == dtype
            for t in tensors
        )  # a subclass may have no memory of its own

    def _finish(self, targets: Column, weights: Column, saved: Column) -> None:
        """Write the bits, once, and what goes with them."""
        if self._gradients is None:
            return
        columns = (*self._gradients, targets, weights, saved)
        self._gradients = None
        plan = self._plan
        if plan.chunks == 0:
            return
        places = torch.empty(plan.room + 1, dtype=torch.int64, device=plan.device)
        keys = torch.empty(plan.room + 1, dtype=torch.int32, device=plan.device)
        with self._guard():
            _mask[(plan.chunks,)](
                plan.pool_table, plan.tensor_table, plan.share_table, plan.addresses(columns),
                plan.chunk_tensor, plan.chunk_start, keys, places, self._state, self._bits,
                CODE=plan.code, ALIGNED=_aligned(*columns), **OPTIONS["_mask"],
            )  # fmt: skip

    def _use_bits(self, what: int, targets: Column, weights: Column, saved: Column) -> None:
        plan = self._plan
        if plan.chunks == 0:
            return
        columns = (self._none, self._none, targets, weights, saved)
        with self._guard():
            _use_bits[(plan.chunks,)](
                plan.tensor_table, plan.addresses(columns), plan.chunk_tensor, plan.chunk_start,
                self._bits, CODE=plan.code, ALIGNED=_aligned(*columns), WHAT=what,
                **OPTIONS["_use_bits"],
            )  # fmt: skip

    def _guard(self) -> Any:
        device = self._plan.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _only(column: Column, flags: Sequence[bool], wanted: bool = True) -> list[Tensor | None]:
    """Return the column with None where the flag is another."""
    return [t if flag is wanted else None for t, flag in zip(column, flags, strict=True)]


def _aligned(*columns: Column) -> bool:
    """Tell whether all tensors begin where loads of 16 bytes can."""
    return all(t is None or t.data_ptr() % 16 == 0 for column in columns for t in column)
