"""The Triton kernels: score, exact selection and masking of all tensors of a model.

What flows where, for each pool of tensors that share a threshold:

1. ``_bracket`` reads a jittered sample of the scores, in registers, and finds a window of scores in
   which the k-th highest almost surely lies. A pool that fits into the registers is done here.
2. ``_count`` reads both gradients once and counts exactly how many scores lie above the window and
   in each of 14 bins of it. The last block to finish finds the bin with the k-th highest. A window
   that missed, or a bin with too many, is noticed there and narrowed by that block: slow, exact.
3. ``_mask`` reads the gradients again, in reverse, while their end is still in the cache. It writes
   one bit for each weight, sets the gradient of what is conserved to 0 and saves the weights. The
   few scores in the bin go to a list.
4. ``_resolve`` ranks each list, in registers where it fits, and corrects the bits.
5. ``_use_bits``, after the inner optimizer's step, puts back what is conserved.

Tensors come as a table of addresses, so that their number does not matter. Nothing waits for the
host. Counts are integers and decide everything, so each run gives the same mask. Scores are
compared by their bits, the *keys*: those of floats >= 0 rank like the floats. All kernels round
products and sums one by one (no fused multiply-add), so that they agree with each other and with
`_reference`.

The sampled bracket is that of Floyd and Rivest (1975); the last block that finishes a reduction is
that of AIR Top-K (Zhang et al., SC 2023); tables of addresses are those of apex and of dion.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

WORD = 32  # weights in a word of bits
BLOCK = tl.constexpr(2048)  # weights at a time
MASK_BLOCK = tl.constexpr(1024)  # in `_mask`, which needs more registers for each
SLOW = tl.constexpr(512)  # the same on the ways that are seldom taken: fewer registers
CHUNK = tl.constexpr(15 * 2048)  # weights of a program: 15 fit into a counter of four bits
RUN = tl.constexpr(8)  # neighbours that are sampled together: a sector of memory
SAMPLE = tl.constexpr(16384)  # scores that a program of `_bracket` holds
TURN = tl.constexpr(8192)  # listed scores that a program of `_resolve` holds
STEP = tl.constexpr(2048)  # listed weights at a time, where more of each is needed
BINS = tl.constexpr(14)  # of the window; fields 0 and 15 count what is below and above

NAN = tl.constexpr(0x7F800001)  # one key for all NaN, right above infinity
PASS = tl.constexpr(1 << 40)  # an index above all others
PLACE_BITS = tl.constexpr(33)  # of an entry of the list, the others are its key
PLACES = tl.constexpr((1 << 33) - 1)

# Columns of the tables. Of a tensor:
T_NUMEL, T_POOL, T_BASE, T_INNER, T_OUTER, T_CODE = (tl.constexpr(i) for i in range(6))
T_WIDTH = tl.constexpr(6)
# of the addresses:
A_NAT, A_ADV, A_TARGET, A_WEIGHT, A_SAVED = (tl.constexpr(i) for i in range(5))
A_WIDTH = tl.constexpr(5)
# of a pool:
P_SIZE, P_K, P_CHUNK, P_CHUNKS, P_RUN, P_RUNS = (tl.constexpr(i) for i in range(6))
P_ABOVE, P_BELOW, P_ENOUGH, P_LIST, P_ROOM, P_ONLY = (tl.constexpr(i) for i in range(6, 12))
P_WIDTH = tl.constexpr(12)
# of a pool's state. The window and how keys get their bin: S_LO .. S_HI, S_BASE, S_FACTOR. What was
# decided: above S_HIGH a weight is in; from S_LOW to S_HIGH, if that is anything, by its index up
# to S_LAST, or by the list, of which the S_MISSING highest are in. And counters.
S_LO, S_HI, S_BASE, S_FACTOR, S_LOW, S_HIGH, S_LAST, S_BY_LIST, S_MISSING, S_LISTED, S_TICKET = (
    tl.constexpr(i) for i in range(11)
)
S_WIDTH = tl.constexpr(11)
# What a column of the addresses has: for no tensor, for some, for all.
NONE, SOME, EACH = (tl.constexpr(i) for i in range(3))

# How each kernel is compiled. Scores are rounded step by step, so that all kernels agree on them.
# The caps on registers keep three or four blocks on an SM; what spills is on ways seldom taken.
OPTIONS: dict[str, dict[str, Any]] = {
    "_bracket": {"num_warps": 16, "enable_fp_fusion": False},
    "_count": {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 64},
    "_mask": {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 80},
    "_resolve": {"num_warps": 16, "enable_fp_fusion": False},
    "_use_bits": {"num_warps": 8, "enable_fp_fusion": False},
}
if torch.version.hip is not None:
    for options in OPTIONS.values():
        options.pop("maxnreg", None)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
JOINT = tl.constexpr(not INTERPRETED)  # sums of several numbers as one: slow in the interpreter


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
def _raw_keys(
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
    BOTH: tl.constexpr,
):
    """Return the bits of alpha * |g_nat| + beta * |g_adv|.

    A gradient at address 0 is left out; ``BOTH`` says that there is none, and its loads need not
    wait for each other.
    """
    if BOTH:
        g_nat = _load(nat, offsets, mask, code, CODE, ALIGNED, FULL)
        g_adv = _load(adv, offsets, mask, code, CODE, ALIGNED, FULL)
        score = tl.abs(g_nat) * alpha + tl.abs(g_adv) * beta
    else:
        score = tl.zeros(offsets.shape, tl.float32)
        if nat != 0:
            score = tl.abs(_load(nat, offsets, mask, code, CODE, ALIGNED, FULL)) * alpha
        if adv != 0:
            score += tl.abs(_load(adv, offsets, mask, code, CODE, ALIGNED, FULL)) * beta
    return score.to(tl.int32, bitcast=True)


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
    BOTH: tl.constexpr,
):
    """Return the same with one key for all NaN."""
    raw = _raw_keys(nat, adv, offsets, mask, alpha, beta, code, CODE, ALIGNED, FULL, BOTH)
    return tl.minimum(raw, NAN)


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
def _add(a0, b0, c0, d0, a1, b1, c1, d1):
    return a0 + a1, b0 + b1, c0 + c1, d0 + d1


@triton.jit
def _words(counters):
    """Add up counters of four bits, 16 in each int64, to four words of four counters.

    Counter w + 4 q is in word w, 16 bits from bit 16 q on.
    """
    every_fourth = 0x000F000F000F000F
    a = counters & every_fourth
    b = (counters >> 4) & every_fourth
    c = (counters >> 8) & every_fourth
    d = (counters >> 12) & every_fourth
    if JOINT:
        a, b, c, d = tl.reduce((a, b, c, d), 0, _add)
    else:
        a, b, c, d = tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d)
    return a, b, c, d


@triton.jit
def _fields(counters):
    """Add up counters of four bits, 16 in each int64; returns int64 of shape [16]."""
    a, b, c, d = _words(counters)
    field = tl.arange(0, 16)
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
def _first_width(count):
    """Return log2 of ``count``, rounded up to a multiple of 4, 4 at least."""
    width = tl.full([], 4, tl.int64)
    while (tl.full([], 1, tl.int64) << width) < count:
        width += 4
    return width


@triton.jit
def _one_in(values, valid, lo, hi, shift):
    """Return counters with a one in the field of each value in lo .. hi, 1 << shift to a field."""
    value = values.to(tl.int64)
    v = value - lo
    inside = valid & (v >= 0) & ((v >> shift) < 16) & (value <= hi)
    field = tl.where(inside, v >> shift, 0)
    return tl.where(inside, tl.full(values.shape, 1, tl.int64) << (4 * field), 0)


@triton.jit
def _field(a, b, c, d, F: tl.constexpr):
    """Return counter F of what `_words` returns, int32."""
    if F % 4 == 0:
        word = a
    elif F % 4 == 1:
        word = b
    elif F % 4 == 2:
        word = c
    else:
        word = d
    return ((word >> (F // 4 * 16)) & 0xFFFF).to(tl.int32)


@triton.jit
def _rank(values, lo, width, k, enough, N: tl.constexpr, THREADS: tl.constexpr):
    """Narrow down the k-th highest of int32 ``values``, held in registers; -1 is none.

    From lo .. lo + (1 << width) - 1, sixteen ways at a time, until at most ``enough`` are left, or
    one value, or, where ``enough`` is 0, just those that are wanted. Returns the lowest value of
    what is left (0 if there are fewer than k values), log2 of its width, how many values are above
    and how many in it.
    """
    PARTS: tl.constexpr = N // (8 * THREADS) if N > 8 * THREADS else 1
    above = tl.zeros([], tl.int32)
    inside = tl.full([], 1 << 30, tl.int32)
    while (width > 0) & (inside > enough) & ((inside != k - above) | (enough > 0)):
        # The last turn may have fewer fields; what is in the others was counted above already.
        fields = tl.full([], 1, tl.int32) << tl.minimum(width, 4)
        width = tl.maximum(width - 4, 0)
        # What is below lo, or -1, becomes large: no field.
        field = (values - lo).to(tl.uint32, bitcast=True) >> width.to(tl.uint32, bitcast=True)
        ones = tl.full([N], 1, tl.int64) << ((field & 15) * 4).to(tl.int64)
        ones = tl.where(field < fields.to(tl.uint32, bitcast=True), ones, 0)
        eights = tl.sum(tl.reshape(ones, [PARTS, 8, N // 8 // PARTS]), axis=1)  # within a thread
        a, b, c, d = _words(tl.reshape(eights, [N // 8]))
        found = tl.full([], -1, tl.int32)
        higher = above
        inside = tl.zeros([], tl.int32)
        for i in tl.static_range(16):
            count = _field(a, b, c, d, 15 - i)
            hit = (higher < k) & (k <= higher + count)
            found = tl.where(hit, 15 - i, found)
            above = tl.where(hit, higher, above)
            inside = tl.where(hit, count, inside)
            higher += count
        lo = tl.where(found < 0, 0, lo + (found << width))
        width = tl.where(found < 0, 0, width)
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
def _sampled_keys(row, tensors, shares, addresses, run_tensor, run_start, CODE: tl.constexpr):
    """Return the keys that a pool's program looks at, -1 where there is none."""
    only = tl.load(row + P_ONLY)
    if only >= 0:
        keys = _keys_of_one(row, only, tensors, shares, addresses, run_start, CODE)
    else:
        keys = _keys_of_many(row, tensors, shares, addresses, run_tensor, run_start, CODE)
    return keys


@triton.jit
def _keys_of_one(row, t, tensors, shares, addresses, run_start, CODE: tl.constexpr):
    """Do that in a pool of one tensor: what the tables say of it is read once."""
    i = tl.arange(0, SAMPLE)
    run = i // RUN
    valid = run < tl.load(row + P_RUNS)
    at = tl.load(run_start + tl.load(row + P_RUN) + run, mask=valid, other=0) + i % RUN
    valid = valid & (at < tl.load(tensors + t * T_WIDTH + T_NUMEL))
    code = tl.load(tensors + t * T_WIDTH + T_CODE)
    nat = tl.load(addresses + t * A_WIDTH + A_NAT)
    adv = tl.load(addresses + t * A_WIDTH + A_ADV)
    alpha = tl.load(shares + t * 2)
    beta = tl.load(shares + t * 2 + 1)
    keys = _keys(nat, adv, at, valid, alpha, beta, code, CODE, False, False, False)
    return tl.where(valid, keys, -1)


@triton.jit
def _keys_of_many(row, tensors, shares, addresses, run_tensor, run_start, CODE: tl.constexpr):
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
    return tl.where(valid, tl.minimum(score.to(tl.int32, bitcast=True), NAN), -1)


@triton.jit
def _store_window(s, lo, hi):
    """Store the window lo .. hi and how a key in it gets its bin.

    A key's bin is umulhi(key - base, factor): 1 from lo on, 15 above the window, whose upper edge
    moves a little for that.
    """
    factor = (tl.full([], BINS, tl.int64) << 32) // (hi - lo + 1)
    base = lo - _edge(1, factor)
    tl.store(s + S_LO, lo)
    tl.store(s + S_HI, tl.minimum(base + _edge(BINS + 1, factor) - 1, NAN))
    tl.store(s + S_BASE, base)
    tl.store(s + S_FACTOR, factor)


@triton.jit
def _edge(field, factor):
    """Return the least number whose product with ``factor`` is ``field`` << 32 or more."""
    return ((field + tl.zeros([], tl.int64) << 32) + factor - 1) // factor


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
    THREADS: tl.constexpr,
):
    pool = tl.program_id(0)
    row = pools + pool * P_WIDTH
    s = state + pool * S_WIDTH
    tl.store(s + S_LISTED, 0)
    tl.store(s + S_TICKET, 0)
    tl.store(s + S_BY_LIST, 0)
    tl.store(s + S_LAST, -1)
    k = tl.load(row + P_K)
    size = tl.load(row + P_SIZE)
    if k <= 0:  # -1: all of them, 0: none
        tl.store(s + S_LOW, 0x7FFFFFFF)
        tl.store(s + S_HIGH, tl.where(k < 0, -1, 0x7FFFFFFE))
    else:
        keys = _sampled_keys(row, tensors, shares, addresses, run_tensor, run_start, CODE)
        one = tl.full([], 1, tl.int32)
        top = tl.full([], 31, tl.int32)
        if tl.load(row + P_CHUNKS) == 0:  # the whole pool is here
            k32 = k.to(tl.int32)
            low, _, above, inside = _rank(keys, one, top, k32, 0, SAMPLE, THREADS)
            high = tl.maximum(low - 1, 0)
            if (low > 0) & (k32 - above < inside):
                high = low
                t, at, valid = _sampled(row, tensors, run_tensor, run_start)  # not kept
                base = tl.load(tensors + t * T_WIDTH + T_BASE, mask=valid, other=0)
                inner = tl.load(tensors + t * T_WIDTH + T_INNER, mask=valid, other=1)
                outer = tl.load(tensors + t * T_WIDTH + T_OUTER, mask=valid, other=1)
                back = size - 1 - (base + _row_major(at, inner, outer))
                back = tl.where(keys == low, back, -1).to(tl.int32)
                zero = tl.zeros([], tl.int32)
                width = _first_width(size).to(tl.int32)
                # To the end: one is left, which is the last that is taken.
                back, width, _, _ = _rank(back, zero, width, k32 - above, 0, SAMPLE, THREADS)
                tl.store(s + S_LAST, size - 1 - back)
            tl.store(s + S_LOW, tl.maximum(low, 1))
            tl.store(s + S_HIGH, high)
        else:
            k_above = tl.load(row + P_ABOVE).to(tl.int32)
            k_below = tl.load(row + P_BELOW)
            enough = tl.load(row + P_ENOUGH).to(tl.int32)
            lo = tl.full([], 1, tl.int64)
            hi = tl.full([], NAN, tl.int64)
            if k_above > 0:
                edge, width, _, _ = _rank(keys, one, top, k_above, enough, SAMPLE, THREADS)
                hi = tl.minimum(edge.to(tl.int64) + (tl.full([], 1, tl.int64) << width) - 1, NAN)
            if k_below <= size:
                below = k_below.to(tl.int32)
                edge, _, _, _ = _rank(keys, one, top, below, enough, SAMPLE, THREADS)
                lo = tl.maximum(edge, 1).to(tl.int64)
            _store_window(s, lo, tl.maximum(hi, lo + 15))


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
    least,
    most,
    base,
    factor,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Count the keys of a chunk in the bins of the window, once they are put into least .. most."""
    i = tl.arange(0, BLOCK)
    for block in range(0, tl.cdiv(left, BLOCK)):
        at = block * BLOCK + i
        mask = at < left
        keys = _raw_keys(nat, adv, at, mask, alpha, beta, code, CODE, ALIGNED, FULL, BOTH)
        keys = tl.minimum(tl.maximum(keys, least), most) - base
        field = tl.umulhi(keys.to(tl.uint32, bitcast=True), factor)
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
            keys = _keys(nat, adv, at, mask, alpha, beta, code, CODE, False, False, False)
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
    BOTH: tl.constexpr,
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
        base = tl.load(s + S_BASE)
        f32 = tl.load((s + S_FACTOR).to(tl.pointer_type(tl.uint32)))  # its lower half
        least = (lo - 1).to(tl.int32)
        most = tl.minimum(hi + 1, NAN).to(tl.int32)
        b32 = base.to(tl.int32)
        acc = tl.zeros([BLOCK], tl.int64)
        if left % BLOCK == 0:
            acc = _add_chunk(
                acc, nat, adv, left, alpha, beta, code, least, most, b32, f32,
                CODE, ALIGNED, True, BOTH,
            )  # fmt: skip
        else:
            acc = _add_chunk(
                acc, nat, adv, left, alpha, beta, code, least, most, b32, f32,
                CODE, ALIGNED, False, BOTH,
            )  # fmt: skip
        word_a, word_b, word_c, word_d = _words(acc)
        tl.store(counts + c * 4, word_a)
        tl.store(counts + c * 4 + 1, word_b)
        tl.store(counts + c * 4 + 2, word_c)
        tl.store(counts + c * 4 + 3, word_d)
        tl.debug_barrier()
        ticket = tl.atomic_add(s + S_TICKET, 1, sem="acq_rel")
        chunk = tl.load(row + P_CHUNK)
        chunks = tl.load(row + P_CHUNKS)
        if ticket == chunks - 1:  # all have counted: decide
            f = tl.arange(0, 16)
            tile = tl.zeros([64, 16], tl.int64)
            for first in range(0, chunks, 64):
                n = first + tl.arange(0, 64)
                word = tl.load(
                    counts + (chunk + n)[:, None] * 4 + (f % 4)[None, :],
                    mask=(n < chunks)[:, None],
                    other=0,
                    cache_modifier=".cg",
                )
                tile += (word >> (f // 4 * 16).to(tl.int64)[None, :]) & 0xFFFF
            field, above, inside = _cross(tl.sum(tile, axis=0), tl.zeros([], tl.int64), k)
            factor = tl.load(s + S_FACTOR)
            one = tl.full([], 1, tl.int64)
            low = one + tl.zeros([], tl.int64)
            high = lo - 1
            if field == BINS + 1:  # the sample misled
                low = hi + 1
                high = tl.full([], NAN, tl.int64)
            elif field > 0:
                low = base + _edge(field, factor)
                high = tl.minimum(base + _edge(field + 1, factor) - 1, hi)
            room = tl.load(row + P_ROOM)
            size = tl.load(row + P_SIZE)
            width = _first_width(high - low + 1)
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
                low = tl.maximum(low, 1)
                tl.store(s + S_LOW, low)
                tl.store(s + S_HIGH, low - 1)
            elif inside <= room:
                tl.store(s + S_LOW, low)
                tl.store(s + S_HIGH, high)
                tl.store(s + S_BY_LIST, 1)
            else:  # one value, more often than there is room: the first of them, by their places
                lowest = tl.zeros([], tl.int64)
                places = _first_width(size)
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
def _list(special, keys, places, listed, entries, room):
    """Put what is special on the list: a thread takes room for its four weights at once."""
    s0, s1, s2, s3 = _four(special.to(tl.int32))
    count = s0 + s1 + s2 + s3
    lower_half = listed.to(tl.pointer_type(tl.int32)) + tl.zeros(count.shape, tl.int32)
    number = tl.atomic_add(lower_half, count, mask=count != 0, sem="relaxed")
    e0, e1, e2, e3 = _four((keys.to(tl.int64) << PLACE_BITS) | places)
    # As unsigned numbers: whatever has been added up, nothing is stored outside.
    tl.store(entries + number, e0, mask=(s0 != 0) & (number.to(tl.uint32, bitcast=True) < room))
    number += s0
    tl.store(entries + number, e1, mask=(s1 != 0) & (number.to(tl.uint32, bitcast=True) < room))
    number += s1
    tl.store(entries + number, e2, mask=(s2 != 0) & (number.to(tl.uint32, bitcast=True) < room))
    number += s2
    tl.store(entries + number, e3, mask=(s3 != 0) & (number.to(tl.uint32, bitcast=True) < room))


@triton.jit
def _four(block):
    """Split rows into groups of four neighbours; return the first of each, the second, and so on.

    The four are one thread's, so nothing moves.
    """
    pairs = tl.reshape(block, [MASK_BLOCK // 4, 2, 2])
    even, odd = tl.split(pairs)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


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
    place,
    words,
    alpha,
    beta,
    code,
    low,
    high,
    by_list,
    last,
    listed,
    entries,
    room,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BOTH: tl.constexpr,
    TARGET: tl.constexpr,
    SAVED: tl.constexpr,
):
    if FULL:
        mask = tl.full(at.shape, 1, tl.int1)
    else:
        mask = at < left
    keys = _keys(nat, adv, at, mask, alpha, beta, code, CODE, ALIGNED, FULL, BOTH)
    chosen = mask & (keys > high)
    kept = chosen
    if by_list != 0:
        special = mask & (keys >= low) & (keys <= high)
        kept = chosen | special  # until it is resolved
        _list(special, keys, place + at, listed, entries, room)
    elif low <= high:
        special = mask & (keys >= low) & (keys <= high)
        index = _row_major(start + at.to(tl.int64), tl.load(row + T_INNER), tl.load(row + T_OUTER))
        chosen = chosen | (special & (tl.load(row + T_BASE) + index <= last))
        kept = chosen
    columns = tl.arange(0, 32)
    tl.store(words, tl.sum(chosen.to(tl.int32) << columns[None, :], axis=1))
    if TARGET == EACH or (TARGET == SOME and target != 0):
        bits = _load_bits(target, at, mask, code, CODE, ALIGNED, FULL)
        bits = tl.where(kept, bits, 0)
        _store_bits(target, at, bits, mask, code, CODE, ALIGNED, FULL)
    if SAVED == EACH or (SAVED == SOME and saved != 0):
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
    entries,
    state,
    bits,
    CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BOTH: tl.constexpr,
    TARGET: tl.constexpr,
    SAVED: tl.constexpr,
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
    p = pools + pool * P_WIDTH
    mine = entries + tl.load(p + P_LIST)
    room = tl.load(p + P_ROOM).to(tl.uint32)
    rows = tl.arange(0, MASK_BLOCK // 32)
    inside = rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    place = (c - tl.load(p + P_CHUNK)) * CHUNK
    for block in range(0, tl.cdiv(left, MASK_BLOCK)):
        at = block * MASK_BLOCK + inside
        words = bits + c * (CHUNK // 32) + block * (MASK_BLOCK // 32) + rows
        if (block + 1) * MASK_BLOCK <= left:
            _mask_block(
                nat, adv, target, weight, saved, at, left, start, row, place, words, alpha, beta,
                code, low, high, by_list, last, s + S_LISTED, mine, room,
                CODE, ALIGNED, True, BOTH, TARGET, SAVED,
            )  # fmt: skip
        else:
            _mask_block(
                nat, adv, target, weight, saved, at, left, start, row, place, words, alpha, beta,
                code, low, high, by_list, last, s + S_LISTED, mine, room,
                CODE, ALIGNED, False, BOTH, TARGET, SAVED,
            )  # fmt: skip


# 4. Resolve.


@triton.jit
def _entry_key(entry):
    return ((entry >> PLACE_BITS) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _entry_tensor(entry, chunk, only, mask, chunk_tensor, chunk_start):
    """Return tensor and place in its memory of listed weights."""
    place = entry & PLACES
    if only >= 0:
        t = only + tl.zeros(entry.shape, tl.int64)
        at = place
    else:
        c = chunk + place // CHUNK
        t = tl.load(chunk_tensor + c, mask=mask, other=0).to(tl.int64)
        at = tl.load(chunk_start + c, mask=mask, other=0) + place % CHUNK
    return t, at


@triton.jit
def _entry_index(t, at, mask, tensors):
    """Return the row-major index of listed weights in their pool."""
    row = tensors + t * T_WIDTH
    index = _row_major(
        at,
        tl.load(row + T_INNER, mask=mask, other=1),
        tl.load(row + T_OUTER, mask=mask, other=1),
    )
    return tl.load(row + T_BASE, mask=mask, other=0) + index


@triton.jit
def _list_fields(
    count,
    lo,
    shift,
    tie,
    size,
    mine,
    chunk,
    only,
    tensors,
    chunk_tensor,
    chunk_start,
    BY_INDEX: tl.constexpr,
):
    """Count a list in 16 fields: keys, or places of keys that equal ``tie``."""
    fields = tl.zeros([16], tl.int64)
    i = tl.arange(0, STEP)
    for first in range(0, count, STEP):
        mask = first + i < count
        entry = tl.load(mine + first + i, mask=mask, other=0)
        keys = _entry_key(entry)
        if BY_INDEX:
            mask = mask & (keys == tie)
            t, at = _entry_tensor(entry, chunk, only, mask, chunk_tensor, chunk_start)
            back = size - 1 - _entry_index(t, at, mask, tensors)
            fields += _fields(_one_in(back, mask, lo, PASS, shift))
        else:
            fields += _fields(_one_in(keys, mask, lo, PASS, shift))
    return fields


@triton.jit
def _resolve(
    pools,
    tensors,
    addresses,
    chunk_tensor,
    chunk_start,
    entries,
    state,
    bits,
    CODE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Rank what was listed; set the bits of the highest, and the other targets to 0."""
    pool = tl.program_id(0)
    row = pools + pool * P_WIDTH
    s = state + pool * S_WIDTH
    if tl.load(s + S_BY_LIST) != 0:
        # More only if the gradients have changed since they were counted.
        count = tl.minimum(tl.load(s + S_LISTED), tl.load(row + P_ROOM))
        missing = tl.load(s + S_MISSING)
        size = tl.load(row + P_SIZE)
        chunk = tl.load(row + P_CHUNK)
        only = tl.load(row + P_ONLY)
        mine = entries + tl.load(row + P_LIST)
        low = tl.load(s + S_LOW)
        width = _first_width(tl.load(s + S_HIGH) - low + 1)
        above = tl.zeros([], tl.int64)
        inside = count
        if count <= TURN:
            i = tl.arange(0, TURN)
            keys = _entry_key(tl.load(mine + i, mask=i < count, other=0))
            found, _, before, among = _rank(
                tl.where(i < count, keys, -1), low.to(tl.int32), tl.minimum(width, 31).to(tl.int32),
                missing.to(tl.int32), 0, TURN, THREADS,
            )  # fmt: skip
            low, above, inside = found.to(tl.int64), before.to(tl.int64), among.to(tl.int64)
        else:
            while width > 0:
                width -= 4
                fields = _list_fields(
                    count, low, width, 0, size, mine, chunk, only, tensors, chunk_tensor,
                    chunk_start, False,
                )  # fmt: skip
                field, above, inside = _cross(fields, above, missing)
                low += field << width
        last = tl.full([], PASS, tl.int64)
        if missing - above < inside:  # ties: the first of them
            lowest = tl.zeros([], tl.int64)
            taken = tl.zeros([], tl.int64)
            width = _first_width(size)
            while width > 0:
                width -= 4
                fields = _list_fields(
                    count, lowest, width, low, size, mine, chunk, only, tensors, chunk_tensor,
                    chunk_start, True,
                )  # fmt: skip
                field, taken, inside = _cross(fields, taken, missing - above)
                lowest += field << width
            last = size - 1 - lowest
        i = tl.arange(0, STEP)
        for first in range(0, count, STEP):
            mask = first + i < count
            entry = tl.load(mine + first + i, mask=mask, other=0)
            keys = _entry_key(entry)
            t, at = _entry_tensor(entry, chunk, only, mask, chunk_tensor, chunk_start)
            chosen = mask & (keys >= low)
            if last < PASS:
                chosen = chosen & ((keys > low) | (_entry_index(t, at, mask, tensors) <= last))
            slot = chunk * CHUNK + (entry & PLACES)
            bit = tl.full([STEP], 1, tl.int32) << (slot % 32).to(tl.int32)
            tl.atomic_or(bits + slot // 32, bit, mask=chosen, sem="relaxed")
            target = tl.load(addresses + t * A_WIDTH + A_TARGET, mask=mask, other=0)
            code = tl.load(tensors + t * T_WIDTH + T_CODE, mask=mask, other=0)
            dropped = mask & (chosen == 0) & (target != 0)
            _store_bits(target, at, tl.zeros([STEP], tl.int32), dropped, code, CODE, False, False)


# 5. What is done with bits that are known.


@triton.jit
def _use_bits(
    tensors,
    addresses,
    chunk_tensor,
    chunk_start,
    bits,
    CODE: tl.constexpr,
    WHAT: tl.constexpr,
):
    """Conserve (0): weight = saved where conserved. Mask (1): target = 0 there, saved = weight.

    Expand (2): target = the mask, one byte for each weight. Lanes take neighbours, with no hint of
    alignment: with masks, wider accesses would be split into scattered ones.
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
        words = tl.load(
            bits + c * (CHUNK // 32) + block * (BLOCK // 32) + rows,
            mask=block * BLOCK + rows * 32 < left,
            other=0,
        )
        chosen = ((words[:, None] >> columns[None, :]) & 1) != 0
        if WHAT == 0:
            if saved != 0:
                back = mask & (chosen == 0)
                old = _load_bits(saved + shift, at, back, code, CODE, False, False)
                _store_bits(weight, at, old, back, code, CODE, False, False)
        elif WHAT == 1:
            if target != 0:
                now = _load_bits(target + shift, at, mask, code, CODE, False, False)
                now = tl.where(chosen, now, 0)
                _store_bits(target + shift, at, now, mask, code, CODE, False, False)
            if saved != 0:
                now = _load_bits(weight, at, mask, code, CODE, False, False)
                _store_bits(saved + shift, at, now, mask, code, CODE, False, False)
        else:
            if target != 0:
                p = (target + start).to(tl.pointer_type(tl.int8))
                tl.store(p + at, chosen.to(tl.int8), mask=mask)
