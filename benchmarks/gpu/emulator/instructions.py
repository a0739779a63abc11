"""What each instruction does to the 32 lanes of a warp.

A register holds an array of 32 unsigned numbers, or bools, that is replaced and never changed. An
instruction becomes a function of a warp and of the lanes that take part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .parse import Fault, Instruction, parse

Array = np.ndarray
LANES = 32
LANE = np.arange(LANES, dtype=np.int32)
ALL = LANE >= 0
END = 1 << 30  # where a lane goes that ends
GARBAGE = 0xA5C3_96F1_5B3C_E7D9  # in registers that nothing has written

# How an operation sees a register, and how a register is kept.
SIZES = (1, 2, 4, 8)
TYPES = {f"{t}{8 * n}": np.dtype(f"{'i' if t == 's' else 'u'}{n}") for t in "bus" for n in SIZES}
TYPES |= {"f32": np.dtype("f4"), "f32x2": np.dtype(("f4", 2)), "f16": np.dtype("f2")}
TYPES |= {"bf16": np.dtype("u2"), "pred": np.dtype(bool)}
RAW = {k: t if k == "pred" else np.dtype(f"u{t.itemsize}") for k, t in TYPES.items()}
BITS = ("b16", "b32", "b64")
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
Function = Callable[..., Any]
Names = Sequence[str]


def _wide(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Choose four of eight bytes, or their signs."""
    picks = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & 15
    chosen = np.stack([a, b], 1).view("u1")[LANE[:, None], picks & 7]
    return np.where(picks > 7, (chosen > 127) * 255, chosen).astype("u1").view("u4").ravel()


def _of_all(whole: Array, found: Array) -> Array:
    """Return what lanes have found together, if it was the whole warp."""
    if not whole.all():
        raise Fault("only for a part of the warp")
    return np.broadcast_to(found, LANES)


def _up(a: Array, by: Array, bound: Array, members: Array) -> Array:
    return _of_all((members == -1) & (bound == 0), a[np.where(by <= LANE, LANE - by, LANE)])


def _across(a: Array, by: Array, bound: Array, members: Array) -> Array:
    return _of_all((members == -1) & (bound == 31), a[LANE ^ by])


# By types that they are known for, and by name without the type.
KNOWN: dict[tuple[str, ...], dict[str, Function]] = {
    INTEGERS: {
        "add": np.add, "sub": np.subtract, "neg": np.negative, "min": np.minimum,
        "max": np.maximum, "mul.lo": np.multiply, "mad.lo": lambda a, b, c: a * b + c,
        "div": lambda a, b: np.where(b == 0, ~b, (a - np.fmod(a, b)) // b), "rem": np.fmod,
        "setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater,
        "setp.ge": np.greater_equal,
        **{f"cvt.{to}": lambda a, to=to: a.astype(TYPES[to]) for to in INTEGERS},
    },
    (*WIDE,): {
        "mul.wide": lambda a, b: _wide(a) * _wide(b),
        "mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c,
    },
    BITS: {"shl": lambda a, by: a << np.minimum(by, 64).astype(a.dtype)},
    BITS + INTEGERS: {
        "setp.eq": np.equal, "setp.ne": np.not_equal,
        "shr": lambda a, by: a >> np.minimum(by, 64).astype(a.dtype),
    },
    ("pred", *BITS): {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    },
    ("pred", "f32", *BITS, *INTEGERS): {
        "mov": lambda a: a, "selp": lambda a, b, p: np.where(p, a, b),
    },
    ("f32", "f32x2"): {"add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply},
    ("f32",): {"abs": np.abs},
    ("f16",): {"cvt.f32": lambda a: a.astype("f4")},
    ("bf16",): {"cvt.f32": lambda a: (a.astype("u4") << 16).view("f4")},  # seen as bits
    ("u32",): {"bfe": lambda a, at, count: a >> at & ((1 << count) - 1)},
    ("b32",): {
        "popc": lambda a: np.unpackbits(a.view("u1")).reshape(LANES, -1).sum(1),
        "prmt": _permute, "shfl.sync.up": _up, "shfl.sync.bfly": _across,
        "vote.sync.ballot": lambda p, members: _of_all(
            members == -1, np.packbits(p, bitorder="little").view("u4")
        ),
    },
    ("s32",): {"redux.sync.add": lambda a, members: _of_all(members == -1, a.sum(dtype=a.dtype))},
}  # fmt: skip
OPERATIONS = {
    (name, kind): operation
    for kinds, group in KNOWN.items()
    for kind in kinds
    for name, operation in group.items()
}
# Types of operands, where they are not the instruction's.
OTHERS = {
    "shl": ("", "u32"), "shr": ("", "u32"), "bfe": ("", "s64", "s64"), "selp": ("", "", "pred"),
    "mad.wide": ("", "", "wide"), "shfl.sync.up": ("", "s32", "s32", "s32"),
    "shfl.sync.bfly": ("", "s32", "s32", "s32"), "vote.sync.ballot": ("pred", "s32"),
}  # fmt: skip

MEMORY = re.compile(
    r"(?:ld|st)\.(?:global|shared|shared::cta)(?:\.cg)?(?:\.v[248])?|"  # .cg: where to cache
    r"(?:atom|red)\.(?:global\.gpu\.(?:relaxed|acq_rel)|(?:relaxed\.sys\.)?shared)\.add|"
    r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x4(?:\.trans)?\.shared"
)


class Step(NamedTuple):
    """An instruction as the machine takes it."""

    it: Instruction
    together: bool  # for all lanes of the warp at once
    guard: Function | None  # of a warp: the lanes that take part
    act: Function | int  # of a warp and lanes; or where they go


class Program:
    """A kernel whose instructions have become functions."""

    def __init__(self, ptx: str, shared: int, name: str) -> None:
        self.shared, self.name, listing = shared, name, parse(ptx)
        self.threads, self.labels = listing.threads, listing.labels
        self.kinds = {"_": "b64", "%tid.x": "b32", "%ctaid.x": "b32"} | listing.registers
        self.slots = {register: i for i, register in enumerate(self.kinds)}
        garbage = {kind: np.full(LANES, GARBAGE, "u8").astype(raw) for kind, raw in RAW.items()}
        self.registers = {name: garbage[kind] for name, kind in self.kinds.items()}  # at first
        self.steps = [self._step(each) for each in listing.code]

    def _step(self, it: Instruction) -> Step:
        try:
            guard = self._read(it.guard, "pred") if it.guard else None
            return Step(it, ".sync" in it.text, guard, self._function(it))
        except (KeyError, ValueError):
            raise Fault(f"no such instruction: {it.text}") from None

    def _function(self, it: Instruction) -> Function | int:
        if "bra" in (it.name, it.kind):
            return self.labels[it.operands[0]]
        if it.kind == "ret":
            return END
        if (it.name, it.kind, *it.operands) == ("bar", "sync", "0"):
            return lambda warp, lanes: setattr(warp, "waiting", True)
        target, *sources = (re.findall(r"[\w%.-]+", operand) for operand in it.operands)
        if it.name == "ld.param":
            number = int(sources[0][0].rpartition("_")[2])
            return self._run(target, [], [], lambda w, lanes: [w.block.machine.arguments[number]])
        if MEMORY.fullmatch(it.name):
            return self._memory(it, target, *sources)
        if it.name == "mov" and "{" in it.text:  # one register to several narrow ones, or back
            names, size = sources[0], RAW[it.kind].itemsize
            narrow = f"b{8 * size // max(len(target), len(names))}"
            kind, into = (it.kind, narrow) if len(target) > 1 else (narrow, it.kind)
            pack = lambda w, lanes, *a: np.stack(a, 1).view(RAW[into]).T.copy()  # noqa: E731
            return self._run(target, names, [kind] * len(names), pack)
        operation, names = OPERATIONS[it.name, it.kind], it.operands[1:]
        known = {"": it.kind, "wide": WIDE.get(it.kind, "")}
        kinds = [known.get(kind, kind) for kind in OTHERS.get(it.name, [""] * len(names))]
        return self._run(target, names, kinds, lambda w, lanes, *a: [operation(*a)])

    def _run(self, target: Names, source: Names, kinds: Names, act: Function) -> Function:
        """Return a function that reads registers and numbers, acts, and sets registers."""
        reads = [self._read(name, kind) for name, kind in zip(source, kinds, strict=True)]
        slots = [(self.slots[name], RAW[self.kinds[name]]) for name in target]

        def run(warp: Any, lanes: Array) -> None:
            found = act(warp, lanes, *[read(warp) for read in reads])
            for (slot, raw), new in zip(slots, found, strict=True):
                new = new.view(raw).ravel() if new.dtype.kind == "f" else new.astype(raw)
                old = warp.registers[slot]
                warp.registers[slot] = new if lanes is ALL else np.where(lanes, new, old)

        return run

    def _read(self, operand: str, kind: str) -> Function:
        """Return a function of a warp: the operand's values."""
        dtype, raw = TYPES[kind], RAW[kind]
        if operand.startswith("%"):
            slot = self.slots[operand]
            return lambda warp: warp.registers[slot].astype(raw, copy=False).view(dtype)
        # Shared memory begins at 0; 0f3F800000 has the bits of a float.
        text = operand.replace("global_smem", "0").replace("0f", "0x").rstrip("U")
        number = int(text, 0) & ((1 << 8 * dtype.itemsize) - 1)
        values = np.full(LANES, number, "u8").astype(raw).view(dtype)
        return lambda warp: values

    def _memory(self, it: Instruction, *operands: list[str]) -> Function:
        """Load, store, or add to memory; an address is a register, a number, or their sum."""
        first, matrix, raw = it.name.split(".")[0], "matrix" in it.name, RAW[it.kind]
        loads, atomic = first in ("ld", "ldmatrix", "atom"), ".add" in it.name
        base, offset = [*operands[loads], "0"][:2]
        target = operands[0] if loads else []
        source = operands[-1] if atomic or not loads else []
        width = raw.itemsize * len(target or source)
        rows, columns = np.divmod(np.arange(64), 8)[:: -1 if ".trans" in it.name else 1]

        def access(warp: Any, lanes: Array, start: Array, by: Array, *values: Array) -> Any:
            memory = warp.block.shared if "shared" in it.name else warp.block.machine.memory
            at = (start + by).astype(np.int64)[lanes]  # 32-bit addresses wrap
            if matrix:  # lane 8 i + j has the address of row j of matrix i, of 8 x 8 numbers
                if (at % 16).any():
                    raise Fault("a row's address is no multiple of 16")
                at = (at.reshape(4, 8)[:, rows] + 2 * columns).ravel()
            if first == "ldmatrix":
                return memory.load(at, 2, warp.clocks).reshape(4, LANES, 4).view("u4")[..., 0]
            found = np.zeros((len(target), LANES), raw)
            if first == "ld":
                found[:, lanes] = memory.load(at, width, warp.clocks).view(raw).T
            elif atomic:
                found[:, lanes] = memory.atomic_add(at, values[0][lanes], warp.clocks)
                for each in np.unique(at) if ".acq_rel" in it.name else ():
                    memory.acquire_release(int(each), warp.clocks)
            else:
                given = np.stack(values) if matrix else np.stack(values, 1)[lanes]
                memory.store(at, given.view("u1").reshape(len(at), -1), warp.clocks)
            return found

        kind = self.kinds.get(base, "b32")
        kinds = [kind, kind] + ["b32" if matrix else it.kind] * len(source)
        return self._run(target, [base, offset, *source], kinds, access)
