"""The GPU backend: exact selection by counting, then masking and restoring, all tensors at once.

Scores become integer keys of the same order. The threshold, the k-th highest key of a pool, is
found digit by digit: a counting pass counts the values of the next digit among the keys that begin
with the digits found so far, and the pool's last program to finish (a ticket tells) picks the digit
of the k-th highest. A mask kernel then compares keys with the threshold.

A table of addresses, sizes and strides describes the tensors, all on one device: each launch
handles all of them, and the host never reads a result. Indices are row-major whatever the strides.
Memory that the table cannot describe takes one PyTorch operation per tensor.

The digits and the ticket follow AIR Top-K (Zhang et al., SC 2023), the tables apex.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rgp_optim import _reference
from rgp_optim._reference import Entries, Masking, Restoring, by_pool, update_count

CHUNK = 32768  # elements per program, a multiple of BLOCK
BLOCK = 2048  # elements at a time
PIECE = 1024  # the same where loads are narrow: unaligned, strided, or at a tensor's end
# Bits per counting pass, 32 in all. Before Triton 3.8 histograms cost an instruction for every few
# bins and element: four passes of 256 bins are faster there than three of 2048.
VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
if VERSION < (3, 4):
    raise ImportError(f"Triton {triton.__version__} has no masked histogram: 3.4 or newer has")
DIGITS = (11, 11, 10) if VERSION >= (3, 8) else (8, 8, 8, 8)
# Each product and sum is rounded, as in the reference: no fused multiply-add.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}

# Columns of a tensor's row. CODE: the dtype for `_count`, bytes per element for `_merge`. N1 .. S2
# give the memory order, see `_offsets`.
SIZE, FIRST_CHUNK, CODE, FAST, N1, N2, S0, S1, S2, MASK = (tl.constexpr(i) for i in range(10))
NAT, ADV, SHARE_NAT, SHARE_ADV, PLACE, POOL = (tl.constexpr(i) for i in range(10, 16))  # _count
TARGET, SOURCE = NAT, ADV  # _merge
WIDTH = tl.constexpr(16)
# A pool's row on the device, and its state: prefix, number still wanted, ticket, then one count per
# digit value.
K, POOL_CHUNK, POOL_CHUNKS, POOL_WIDTH = (tl.constexpr(i) for i in (0, 1, 2, 4))
PREFIX, WANTED, TICKET, COUNTS = (tl.constexpr(i) for i in (0, 1, 2, 4))

EVERYTHING = tl.constexpr(-1)  # k of a fraction of 1: zeros too
ALL_TIES = tl.constexpr(1 << 30)
ABSENT = -1  # in place of a second share's bits
NAN_KEY = tl.constexpr(0x7F800001)  # one key above infinity
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAT = (1, 1, 1, 0, 0)  # N1 .. S2 of contiguous memory
KEYS, GRADIENTS, SCORES = (tl.constexpr(i) for i in range(3))  # what a counting pass reads

Table = list[list[int]]


@triton.jit
def _offsets(row, at, lane):
    """Return offsets in memory of the elements ``at + lane`` of row-major order.

    The tensor has at most three dimensions, (any, N1, N2) with strides S0, S1, S2, after joining
    neighbours. Vectors are divided in 32 bits, which is faster.
    """
    n1, n2 = tl.load(row + N1), tl.load(row + N2)
    s0, s1, s2 = tl.load(row + S0), tl.load(row + S1), tl.load(row + S2)
    offsets = (at + lane) * s0
    if n1 * n2 > 1:
        outer = at // n2
        i2 = (at % n2).to(tl.int32) + lane
        i1 = (outer % n1).to(tl.int32) + i2 // n2.to(tl.int32)
        i0 = outer // n1 + i1 // n1.to(tl.int32)
        offsets = i0 * s0 + (i1 % n1.to(tl.int32)) * s1 + (i2 % n2.to(tl.int32)) * s2
    return offsets


@triton.jit
def _at(address, at, DTYPE: tl.constexpr):
    """Return an aligned pointer; the hint for 16-byte loads counts only behind all arithmetic."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + at, 16)


@triton.jit
def _load_pair(row, at, offsets, mask, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """Load both gradients: a whole aligned block from ``at``, or what the mask allows."""
    nat, adv = tl.load(row + NAT), tl.load(row + ADV)
    if WHOLE:
        a = tl.load(_at(nat, at, DTYPE) + offsets)
        b = tl.load(_at(adv, at, DTYPE) + offsets)
    else:
        a = tl.load(nat.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0)
        b = tl.load(adv.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _new_keys(row, at, offsets, mask, WHOLE: tl.constexpr, READ: tl.constexpr):
    """Return integers that rank like the scores: NaN highest, both zeros 0."""
    code = tl.load(row + CODE)
    if code == 0:
        a, b = _load_pair(row, at, offsets, mask, WHOLE, tl.float32)
    elif code == 1:
        a, b = _load_pair(row, at, offsets, mask, WHOLE, tl.bfloat16)
    else:
        a, b = _load_pair(row, at, offsets, mask, WHOLE, tl.float16)
    if READ == SCORES:
        score = a
    else:
        share_a = tl.load(row + SHARE_NAT).to(tl.int32)
        share_b = tl.load(row + SHARE_ADV).to(tl.int32)
        score = tl.where(share_a >= 0, tl.abs(a) * share_a.to(tl.float32, bitcast=True), 0.0)
        score += tl.where(share_b >= 0, tl.abs(b) * share_b.to(tl.float32, bitcast=True), 0.0)
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    return tl.where(size >= NAN_KEY, NAN_KEY, tl.where(bits < 0, -size, bits))


@triton.jit
def _count(
    rows,  # int64 [tensors, WIDTH]
    owners,  # int64 [chunks]: the tensor of each
    pools,  # int64 [pools, POOL_WIDTH]
    states,  # int64 [pools, STATE], zeros at first
    keys,  # int32: scratch, each tensor padded to whole blocks
    ties,  # int32 [chunks, 2**BITS]: counts of the last digit
    rooms,  # int32 [chunks]: how many ties of each chunk are selected
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    READ: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Count a digit, ``key >> SHIFT``, of the keys that share those before; first make keys."""
    BINS: tl.constexpr = 1 << BITS
    FIRST: tl.constexpr = READ != KEYS
    pid = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(owners + pid) * WIDTH
    start = (pid - tl.load(row + FIRST_CHUNK)) * CHUNK
    size = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    keys += tl.load(row + PLACE) + start
    pool = tl.load(row + POOL)
    state = states + pool * STATE
    prefix = tl.load(state + PREFIX).to(tl.int32)
    if FIRST:  # element by element where loads cannot be wide
        whole = tl.where(tl.load(row + FAST) != 0, size // BLOCK, 0)
        piece = tl.arange(0, PIECE)
        for i in range(whole * BLOCK, size, PIECE):
            inside = i + piece < size
            key = _new_keys(row, 0, _offsets(row, start + i, piece), inside, False, READ)
            tl.store(keys + i + piece, key, mask=inside)
        tl.debug_barrier()
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for i in range(0, size, BLOCK):
        scratch = tl.multiple_of(keys + i, 16) + lane
        counted = i + lane < size
        if FIRST:
            if i < whole * BLOCK:
                key = _new_keys(row, start + i, lane, counted, True, READ)
                tl.store(scratch, key)
            else:
                key = tl.load(scratch)
            digit = (key >> SHIFT) + BINS // 2  # keys may be negative: shifts keep the sign
        else:
            key = tl.load(scratch)
            counted &= (key >> (SHIFT + BITS)) == prefix
            digit = (key >> SHIFT) & (BINS - 1)
        counts += tl.histogram(digit, BINS, mask=counted)
    tl.atomic_add(state + COUNTS + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if SHIFT == 0:
        tl.store(ties + pid * BINS + bins, counts)
    tl.debug_barrier()  # the program's adds come before its ticket: whoever draws the last sees all
    pool_row = pools + pool * POOL_WIDTH
    ticket = tl.atomic_add(state + TICKET, 1, sem="acq_rel")
    if ticket == tl.load(pool_row + POOL_CHUNKS) - 1:
        _pick_digit(state, pool_row, prefix, ties, rooms, SHIFT, BITS, FIRST)


@triton.jit
def _pick_digit(
    state,
    pool_row,
    prefix,
    ties,
    rooms,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Extend the prefix by the digit of the k-th highest key, and clear the counts."""
    BINS: tl.constexpr = 1 << BITS
    bins = tl.arange(0, BINS)
    counts = tl.load(state + COUNTS + bins, cache_modifier=".cg")  # as the atomics left them
    tl.debug_barrier()  # a layout may load a count in several threads
    tl.store(state + COUNTS + bins, tl.zeros([BINS], tl.int64))
    tl.store(state + TICKET, 0)
    if FIRST:
        wanted = tl.load(pool_row + K)
    else:
        wanted = tl.load(state + WANTED)
    above = tl.sum(counts) - tl.cumsum(counts)
    found = (above < wanted) & (wanted <= above + counts)
    digit = tl.sum(tl.where(found, bins, 0))
    wanted -= tl.sum(tl.where(found, above, 0))
    if FIRST:
        tl.store(state + PREFIX, digit - BINS // 2)
    else:
        tl.store(state + PREFIX, (prefix << BITS) | digit)
    tl.store(state + WANTED, wanted)
    if SHIFT == 0:
        _split_ties(ties + digit, rooms, pool_row, wanted, BINS)


@triton.jit
def _split_ties(ties, rooms, pool_row, wanted, BINS: tl.constexpr):
    """Give ``wanted`` ties to the chunks of a pool: the first ones get all that they can take."""
    first = tl.load(pool_row + POOL_CHUNK)
    chunks = tl.load(pool_row + POOL_CHUNKS)
    for i in range(0, chunks.to(tl.int32), 1024):
        chunk = i + tl.arange(0, 1024)
        there = chunk < chunks
        count = tl.load(ties + (first + chunk) * BINS, mask=there, other=0, cache_modifier=".cg")
        count = count.to(tl.int64)
        room = wanted - (tl.cumsum(count) - count)
        room = tl.where(room >= count, ALL_TIES, tl.maximum(room, 0))
        tl.store(rooms + first + chunk, room.to(tl.int32), mask=there)
        wanted -= tl.sum(count)


@triton.jit
def _mask(
    rows, owners, pools, states, keys, rooms, STATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the masks: keys above the threshold, the first ties, no zeros."""
    pid = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(owners + pid) * WIDTH
    start = (pid - tl.load(row + FIRST_CHUNK)) * CHUNK
    size = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    keys += tl.load(row + PLACE) + start
    mask = tl.load(row + MASK) + start
    pool = tl.load(row + POOL)
    threshold = tl.load(states + pool * STATE + PREFIX).to(tl.int32)
    k = tl.load(pools + pool * POOL_WIDTH + K)
    room = tl.load(rooms + pid)
    lane = tl.arange(0, BLOCK)
    for i in range(0, size, BLOCK):
        inside = i + lane < size
        key = tl.load(tl.multiple_of(keys + i, 16) + lane)
        tie = (key == threshold) & inside
        selected = (key > threshold) | (tie & (room == ALL_TIES))
        if (room > 0) & (room < ALL_TIES):  # in at most one chunk per pool
            selected |= tie & (tl.cumsum(tie.to(tl.int32)) <= room)
            room = tl.maximum(room - tl.sum(tie.to(tl.int32)), 0)
        selected = ((selected & (key != 0)) & (k > 0)) | (k == EVERYTHING)
        there = _at(mask, i, tl.int8) + lane
        if i + BLOCK <= size:
            tl.store(there, selected.to(tl.int8))
        else:
            tl.store(there, selected.to(tl.int8), mask=inside)


@triton.jit
def _merge(rows, owners, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr):
    """Set each target to its source (0 if there is none) outside its mask; copies bits."""
    pid = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(owners + pid) * WIDTH
    start = (pid - tl.load(row + FIRST_CHUNK)) * CHUNK
    code = tl.load(row + CODE)
    if code == 2:
        _merge_chunk(row, start, tl.int16, CHUNK, BLOCK, PIECE)
    elif code == 4:
        _merge_chunk(row, start, tl.int32, CHUNK, BLOCK, PIECE)
    else:
        _merge_chunk(row, start, tl.int64, CHUNK, BLOCK, PIECE)


@triton.jit
def _merge_chunk(
    row, start, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr
):
    size = tl.minimum(tl.load(row + SIZE) - start, CHUNK).to(tl.int32)
    target, source, mask = tl.load(row + TARGET), tl.load(row + SOURCE), tl.load(row + MASK)
    whole = tl.where(tl.load(row + FAST) != 0, size // BLOCK, 0) * BLOCK
    lane = tl.arange(0, BLOCK)
    for i in range(0, whole, BLOCK):
        there = _at(target, start + i, DTYPE) + lane
        new = tl.zeros([BLOCK], DTYPE)
        if source != 0:
            new = tl.load(_at(source, start + i, DTYPE) + lane)
        if mask != 0:
            updated = tl.load(_at(mask, start + i, tl.int8) + lane) != 0
            new = tl.where(updated, tl.load(there), new)
        tl.store(there, new)
    piece = tl.arange(0, PIECE)
    for i in range(whole, size, PIECE):
        inside = i + piece < size
        offsets = _offsets(row, start + i, piece)
        there = target.to(tl.pointer_type(DTYPE)) + offsets
        new = tl.zeros([PIECE], DTYPE)
        if source != 0:
            new = tl.load(source.to(tl.pointer_type(DTYPE)) + offsets, mask=inside, other=0)
        if mask != 0:
            flags = mask.to(tl.pointer_type(tl.int8)) + (start + i)
            updated = tl.load(flags + piece, mask=inside, other=0) != 0
            new = tl.where(updated, tl.load(there, mask=inside, other=0), new)
        tl.store(there, new, mask=inside)


def _tables(rows: Table, pools: Table, device: torch.device) -> tuple[Tensor, ...]:
    """Return rows, pools and the owner of each chunk on the device."""
    counts = [-(-row[SIZE.value] // CHUNK) for row in rows]
    for row, first in zip(rows, accumulate(counts, initial=0), strict=False):
        row[FIRST_CHUNK.value] = first
    numbers = torch.tensor([*chain(*rows), *chain(*pools)], dtype=torch.int64, device="cpu")
    owners = torch.repeat_interleave(torch.tensor(counts, device="cpu"))
    table = torch.cat([numbers, owners])
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table.tensor_split([len(rows) * WIDTH.value, numbers.numel()])


@lru_cache(maxsize=4096)
def _layout(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return N1, N2, S0, S1, S2 of a tensor, or None if it takes more than three dimensions."""
    dims: list[tuple[int, int]] = []
    for n, s in zip(shape, stride, strict=True):
        if dims and dims[-1][1] == n * s:
            dims[-1] = dims[-1][0] * n, s
        elif n != 1:
            dims.append((n, s))
    if len(dims) > 3:
        return None
    (_, s0), (n1, s1), (n2, s2) = [*dims, (1, 0), (1, 0), (1, 0)][:3]
    return (n1, n2, s0, s1, s2) if max(n1, n2) < 1 << 30 else None


def _row(size: int, layout: tuple[int, ...], code: int, *rest: int) -> list[int]:
    """Return a row; ``rest`` begins at MASK, with three addresses. `_tables` sets FIRST_CHUNK."""
    fast = layout == FLAT and all(address % 16 == 0 for address in rest[:3])
    row = [size, 0, code, fast, *layout, *rest]
    return row + [0] * (WIDTH.value - len(row))


def select(entries: Entries) -> list[Tensor]:
    """Score and select, or select by scores of any sign; see `_reference.select`."""
    present = [each.present for each in entries]
    if any(g.dtype not in CODES for g in present):
        return _reference.select(entries)
    masks = [torch.empty(g.shape, dtype=torch.bool, device=g.device) for g in present]
    rows, pool_rows, owned = [], [], []
    chunk = place = 0
    for pool, indices in enumerate(by_pool([each.pool for each in entries])):
        fraction, first = entries[indices[0]].fraction, chunk
        n = sum(masks[i].numel() for i in indices)
        for i in indices:
            gradients, factors = zip(*entries[i].terms, strict=True)
            nat, adv, layout = _same_layout(gradients[0], gradients[-1])
            owned += [nat, adv]  # copies live until they are read
            size = nat.numel()
            addresses = masks[i].data_ptr(), nat.data_ptr(), adv.data_ptr()
            shares = [struct.unpack("<i", struct.pack("<f", factor))[0] for factor in factors]
            shares = [*shares, ABSENT][:2]
            rows.append(_row(size, layout, CODES[nat.dtype], *addresses, *shares, place, pool))
            chunk += -(-size // CHUNK)
            place += -(-size // BLOCK) * BLOCK
        k = EVERYTHING.value if fraction == 1.0 else update_count(n, fraction)
        pool_rows.append([k, first, chunk - first, 0])
    if chunk == 0:
        return masks
    state = COUNTS.value + (1 << max(DIGITS))
    sizes = {"STATE": state, "CHUNK": CHUNK, "BLOCK": BLOCK, **OPTIONS}
    device = masks[0].device
    with torch.cuda.device_of(masks[0]):
        table, pool_table, owners = _tables(rows, pool_rows, device)
        states = torch.zeros(len(pool_rows) * state, dtype=torch.int64, device=device)
        keys = torch.empty(place, dtype=torch.int32, device=device)
        ties = torch.empty(chunk << DIGITS[-1], dtype=torch.int32, device=device)
        rooms = torch.empty(chunk, dtype=torch.int32, device=device)
        shift, read = 32, (SCORES if entries[0].alpha is None else GRADIENTS).value
        for bits in DIGITS:
            shift -= bits
            _count[(chunk,)](
                table, owners, pool_table, states, keys, ties, rooms, SHIFT=shift, BITS=bits,
                READ=read, PIECE=PIECE, **sizes,
            )  # fmt: skip
            read = KEYS.value
        _mask[(chunk,)](table, owners, pool_table, states, keys, rooms, **sizes)
    return masks


def _same_layout(nat: Tensor, adv: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return two gradients, copied if need be, and the layout that they share."""
    layout = _layout(nat.shape, nat.stride())
    if layout is None or layout != _layout(adv.shape, adv.stride()):
        return nat.contiguous(), adv.contiguous(), FLAT
    return nat, adv, layout


def zero_and_save_(rows: Sequence[Masking]) -> list[Tensor | None]:
    """Zero each gradient outside its mask and copy each weight; see `_reference`."""
    saved = [None if weight is None else torch.empty_like(weight) for *_, weight in rows]
    zeroed = [(gradient, None, mask) for mask, gradient, _ in rows if gradient is not None]
    pairs = zip(saved, rows, strict=True)
    copied = [(copy, weight, None) for copy, (*_, weight) in pairs if copy is not None]
    _merge_all([*zeroed, *copied])
    return saved


def restore_(rows: Sequence[Restoring]) -> None:
    """Put back each weight outside its mask, in place and bit for bit; see `_reference`."""
    _merge_all([(weight, saved, mask) for mask, weight, saved in rows])


def _merge_all(merges: Sequence[tuple[Tensor, Tensor | None, Tensor | None]]) -> None:
    """Set each target to its source (None: 0) outside its mask (None: everywhere)."""
    table, masks = Table(), []
    for target, source, mask in merges:
        layout = FLAT if mask is None else _layout(target.shape, target.stride())
        # With equal strides `torch.empty_like` has found the tensor dense.
        alike = source is None or source.stride() == target.stride()
        if layout is None or not alike or target.element_size() not in (2, 4, 8):
            new = torch.zeros_like(target) if source is None else source
            target.copy_(new if mask is None else torch.where(mask, target, new))
            continue
        masks.append(mask if mask is None else mask.contiguous())  # copies live until they are read
        addresses = [0 if t is None else t.data_ptr() for t in (masks[-1], target, source)]
        table.append(_row(target.numel(), layout, target.element_size(), *addresses))
    if any(row[SIZE.value] for row in table):
        with torch.cuda.device_of(merges[0][0]):
            rows, _, owners = _tables(table, [], merges[0][0].device)
            sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK, "PIECE": PIECE, **OPTIONS}
            _merge[(owners.numel(),)](rows, owners, **sizes)
