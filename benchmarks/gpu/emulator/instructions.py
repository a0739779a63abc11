"""What each instruction does to the 32 lanes of a warp.

A register holds an array of 32 unsigned numbers, or bools, that is replaced and never changed. An
instruction becomes a function of a warp and of the lanes that take part.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .parse import Fault, Instruction, parse

if TYPE_CHECKING:
    from .machine import Warp

Array = np.ndarray
LANES = 32
LANE = np.arange(LANES, dtype=np.int32)
ALL = LANE >= 0
END = 1 << 30  # where a lane goes that ends
GARBAGE = 0xA5C3_96F1_5B3C_E7D9  # in registers that nothing has written

# How operations see a register, and how it is kept.
TYPES = {
    f"{letter}{8 * size}": np.dtype(f"{'i' if letter == 's' else 'u'}{size}")
    for letter in "bus"
    for size in (1, 2, 4, 8)
}
TYPES |= {"f32": np.dtype("f4"), "f32x2": np.dtype(("f4", 2)), "f16": np.dtype("f2")}
TYPES |= {"bf16": np.dtype("u2"), "pred": np.dtype(bool)}
RAW = {kind: np.dtype(f"u{dtype.itemsize}") for kind, dtype in TYPES.items()}
RAW["pred"] = TYPES["pred"]
BITS = ("b16", "b32", "b64")
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _wide(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def _amount(a: Array, by: Array) -> Array:
    """Return shifts of at most 64, which is what all bits shifted out and more come to."""
    return np.minimum(by, 64).astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Choose four of eight bytes, or their signs."""
    picks = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & 15
    chosen = np.stack([a, b], 1).view(np.uint8)[LANE[:, None], picks & 7]
    return (
        np.where(picks > 7, (chosen > 127) * 255, chosen).astype(np.uint8).view(np.uint32).ravel()
    )


def _of_all(whole: Array, found: Array) -> Array:
    """Return what lanes have found together, if it was the whole warp."""
    if not whole.all():
        raise Fault("only for a part of the warp")
    return np.broadcast_to(found, LANES)


def _up(a: Array, by: Array, bound: Array, members: Array) -> Array:
    return _of_all((members == -1) & (bound == 0), a[np.where(by <= LANE, LANE - by, LANE)])


def _across(a: Array, by: Array, bound: Array, members: Array) -> Array:
    return _of_all((members == -1) & (bound == 31), a[LANE ^ by])


def _ballot(flags: Array, members: Array) -> Array:
    return _of_all(members == -1, np.packbits(flags, bitorder="little").view("u4"))


def _float32(a: Array) -> Array:
    """Convert float16, or bfloat16 that is seen as bits."""
    return a.astype("f4") if a.dtype == "f2" else (a.astype("u4") << 16).view("f4")


# By name without the type: types that it is known for, what it does, and types of operands that
# are others.
Entry = tuple[tuple[str, ...], Callable[..., Array], tuple[str, ...]]
OPERATIONS: dict[str, Entry] = {
    "add": (INTEGERS, np.add, ()),
    "sub": (INTEGERS, np.subtract, ()),
    "mul.lo": (INTEGERS, np.multiply, ()),
    "mad.lo": (INTEGERS, lambda a, b, c: a * b + c, ()),
    "mul.wide": (tuple(WIDE), lambda a, b: _wide(a) * _wide(b), ()),
    "mad.wide": (tuple(WIDE), lambda a, b, c: _wide(a) * _wide(b) + c, ("", "", "wide")),
    "div": (INTEGERS, lambda a, b: np.where(b == 0, ~b, (a - np.fmod(a, b)) // b), ()),
    "rem": (INTEGERS, np.fmod, ()),
    "min": (INTEGERS, np.minimum, ()),
    "max": (INTEGERS, np.maximum, ()),
    "neg": (INTEGERS, np.negative, ()),
    "add.rn": (("f32", "f32x2"), np.add, ()),
    "sub.rn": (("f32", "f32x2"), np.subtract, ()),
    "mul.rn": (("f32", "f32x2"), np.multiply, ()),
    "abs": (("f32",), np.abs, ()),
    "and": ((*BITS, "pred"), np.bitwise_and, ()),
    "or": ((*BITS, "pred"), np.bitwise_or, ()),
    "xor": ((*BITS, "pred"), np.bitwise_xor, ()),
    "not": ((*BITS, "pred"), np.invert, ()),
    "shl": (BITS, lambda a, by: a << _amount(a, by), ("", "u32")),
    "shr": (BITS + INTEGERS, lambda a, by: a >> _amount(a, by), ("", "u32")),
    "bfe": (("u32",), lambda a, at, n: a >> at & ((1 << n) - 1), ("", "s64", "s64")),
    "mov": ((*BITS, *INTEGERS, "f32", "pred"), lambda a: a, ()),
    "selp": ((*BITS, *INTEGERS, "f32"), lambda a, b, p: np.where(p, a, b), ("", "", "pred")),
    "popc": (("b32",), lambda a: np.unpackbits(a.view("u1")).reshape(LANES, -1).sum(1), ()),
    "prmt": (("b32",), _permute, ()),
    "shfl.sync.up": (("b32",), _up, ("", "s32", "s32", "s32")),
    "shfl.sync.bfly": (("b32",), _across, ("", "s32", "s32", "s32")),
    "vote.sync.ballot": (("b32",), _ballot, ("pred", "s32")),
    "redux.sync.add": (
        ("s32",),
        lambda a, members: _of_all(members == -1, a.sum(dtype=a.dtype)),
        (),
    ),
    "cvt.f32": (("f16", "bf16"), _float32, ()),
    "setp.eq": (INTEGERS + BITS, np.equal, ()),
    "setp.ne": (INTEGERS + BITS, np.not_equal, ()),
    "setp.lt": (INTEGERS, np.less, ()),
    "setp.le": (INTEGERS, np.less_equal, ()),
    "setp.gt": (INTEGERS, np.greater, ()),
    "setp.ge": (INTEGERS, np.greater_equal, ()),
}
OPERATIONS |= {
    f"cvt.{kind}": (INTEGERS, lambda a, to=TYPES[kind]: a.astype(to), ()) for kind in INTEGERS
}

Run = Callable[["Warp", Array], None]
Read = Callable[["Warp"], Array]
Write = Callable[["Warp", Array, Array], None]


class Step(NamedTuple):
    """An instruction as the machine takes it."""

    text: str
    guard: Read | None  # the lanes that take part
    target: int | None  # of a branch
    together: bool  # for all lanes of the warp at once
    run: Run


class Program:
    """A kernel whose instructions have become functions."""

    def __init__(self, ptx: str, shared: int, name: str) -> None:
        self.listing, self.shared, self.name = parse(ptx), shared, name
        kinds = self.listing.registers
        self.slots = {register: i for i, register in enumerate(kinds)}
        garbage = {kind: np.full(LANES, GARBAGE, "u8").astype(RAW[kind]) for kind in kinds.values()}
        self.registers = [garbage[kind] for kind in kinds.values()]  # as a warp begins
        self.steps = [self._step(each) for each in self.listing.code]

    def _step(self, it: Instruction) -> Step:
        target, run = None, _nothing
        try:
            guard = self._read(it.guard, "pred") if it.guard else None
            if it.text.split()[-1] == "ret":
                target = END
            elif "bra" in (it.name, it.kind):
                target = self.listing.labels[it.operands[0]]
            else:
                run = self._function(it)
        except (KeyError, ValueError, AttributeError):
            raise Fault(f"no such instruction: {it.text}") from None
        lanes = guard and ((lambda warp: ~guard(warp)) if it.negated else guard)
        return Step(it.text, lanes, target, ".sync" in it.text, run)

    def _function(self, it: Instruction) -> Run:
        first, *flags = it.name.split(".")
        if it.name == "bar" and (it.kind, *it.operands) == ("sync", "0"):
            return _wait
        if it.name == "ld.param":
            parameter = self.listing.parameters.index(it.operands[1].strip("[]"))
            return self._set(it.operands[0], lambda warp: warp.block.arguments[parameter])
        if it.name == "mov" and "{" in it.text:
            return self._pack(it)
        if first in ("ld", "st", "atom", "red"):
            return self._memory(it, first, flags)
        if first in ("ldmatrix", "stmatrix"):
            return self._matrix(it, first, flags)
        kinds, operation, others = OPERATIONS[it.name]
        if it.kind not in kinds:
            raise ValueError
        names = [WIDE[it.kind] if other == "wide" else other or it.kind for other in others]
        names += [it.kind] * (len(it.operands) - 1 - len(names))
        reads = [self._read(each, kind) for each, kind in zip(it.operands[1:], names, strict=True)]
        return self._set(it.operands[0], lambda warp: operation(*[read(warp) for read in reads]))

    def _read(self, operand: str, kind: str) -> Read:
        """Return a function of a warp: the operand's values."""
        dtype, raw = TYPES[kind], RAW[kind]
        if operand in ("%tid.x", "%ctaid.x"):
            return lambda warp: warp.special[operand].astype(raw)
        if operand.startswith("%"):
            slot = self.slots[operand]
            return lambda warp: warp.registers[slot].astype(raw, copy=False).view(dtype)
        # 0f3F800000 has the bits of a float; shared memory begins at 0.
        text = operand.replace("global_smem", "0").replace("0f", "0x").rstrip("U")
        number = int(text, 0) & ((1 << 8 * dtype.itemsize) - 1)
        values = np.full(LANES, number, "u8").astype(raw).view(dtype)
        return lambda warp: values

    def _write(self, register: str) -> Write:
        """Return a function of a warp, lanes and values that sets a register."""
        if register == "_":
            return lambda warp, lanes, values: None
        slot, raw = self.slots[register], RAW[self.listing.registers[register]]

        def write(warp: Warp, lanes: Array, values: Array) -> None:
            floats = values.dtype.kind == "f"
            values = values.view(raw).reshape(LANES) if floats else values.astype(raw, copy=False)
            old = warp.registers[slot]
            warp.registers[slot] = values if lanes is ALL else np.where(lanes, values, old)

        return write

    def _set(self, register: str, values: Read) -> Run:
        write = self._write(register)
        return lambda warp, lanes: write(warp, lanes, values(warp))

    def _pack(self, it: Instruction) -> Run:
        """Move one register to several narrow ones, or several to one."""
        target, source = (_names(each) for each in it.operands)
        size = RAW[it.kind].itemsize
        narrow = f"b{8 * size // max(len(target), len(source))}"
        into = RAW[it.kind if len(target) == 1 else narrow]
        reads = [self._read(each, it.kind if len(source) == 1 else narrow) for each in source]
        writes = [self._write(each) for each in target]

        def pack(warp: Warp, lanes: Array) -> None:
            values = np.stack([read(warp) for read in reads], 1).view(into)
            for write, value in zip(writes, values.T, strict=True):
                write(warp, lanes, np.ascontiguousarray(value))

        return pack

    def _address(self, operand: str) -> Read:
        found = re.fullmatch(r"\[\s*([\w%]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        base, offset = found.groups()
        kind = self.listing.registers.get(base, "b32")
        read, by = self._read(base, kind), self._read(offset or "0", kind)
        return lambda warp: (read(warp) + by(warp)).astype(np.int64)  # 32-bit addresses wrap

    def _memory(self, it: Instruction, first: str, flags: list[str]) -> Run:
        """Load, store, add; ``.cg`` says only where to cache."""
        size, raw, atomic = RAW[it.kind].itemsize, RAW[it.kind], first in ("atom", "red")
        known = {"add", "relaxed", "acq_rel", "gpu", "sys"} if atomic else {"cg", "v2", "v4", "v8"}
        spaces = {"global", "shared", "shared::cta"} & set(flags)
        if set(flags) - spaces - known or len(spaces) != 1 or atomic != ("add" in flags):
            raise ValueError
        shared, ordered, loads = spaces != {"global"}, "acq_rel" in flags, first in ("ld", "atom")
        address = self._address(it.operands[loads])
        writes = [self._write(each) for each in _names(it.operands[0]) if loads]
        given = [] if first == "ld" else _names(it.operands[-1])
        reads = [self._read(each, it.kind) for each in given]
        width = size * len(given or writes)

        def access(warp: Warp, lanes: Array) -> None:
            memory = warp.block.shared if shared else warp.block.machine.memory
            at = address(warp)[lanes]
            if first == "ld":
                got = memory.load(at, width, warp.clocks).view(raw)
            else:
                values = np.stack([read(warp)[lanes] for read in reads], 1).view(raw)
                if first == "st":
                    memory.store(at, values.view("u1"), warp.clocks)
                else:
                    got = memory.atomic_add(at, values[:, 0], warp.clocks)[:, None]
                    for each in np.unique(at) if ordered else ():
                        memory.acquire_release(int(each), warp.clocks)
            for i, write in enumerate(writes):
                found = np.zeros(LANES, raw)
                found[lanes] = got[:, i]
                write(warp, lanes, found)

        return access

    def _matrix(self, it: Instruction, first: str, flags: list[str]) -> Run:
        """Move 8 x 8 matrices of 16 bits: lane 8 i + j has the address of row j of matrix i."""
        trans, loads = "trans" in flags, first == "ldmatrix"
        if [flag for flag in flags if flag != "trans"] != [
            "sync",
            "aligned",
            "m8n8",
            "x4",
            "shared",
        ]:
            raise ValueError
        address, names = self._address(it.operands[loads]), _names(it.operands[not loads])
        writes = [self._write(each) for each in names if loads]
        reads = [self._read(each, "b32") for each in names if not loads]
        rows, columns = np.divmod(np.arange(64), 8)[:: -1 if trans else 1]

        def move(warp: Warp, lanes: Array) -> None:
            starts, memory = address(warp), warp.block.shared
            if (starts % 16).any():
                raise Fault("a row's address is no multiple of 16")
            for i in range(4):
                at = starts[8 * i + rows] + 2 * columns
                if loads:
                    got = memory.load(at, 2, warp.clocks)
                    writes[i](warp, lanes, got.reshape(LANES, 4).view("u4").ravel())
                else:
                    memory.store(at, reads[i](warp).view("u1").reshape(64, 2), warp.clocks)

        return move


def _names(operand: str) -> list[str]:
    return re.findall(r"[\w%.]+", operand)


def _nothing(warp: Warp, lanes: Array) -> None:
    pass


def _wait(warp: Warp, lanes: Array) -> None:
    warp.waiting = True
