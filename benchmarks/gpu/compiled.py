"""Report registers and instructions of the compiled kernels; needs no GPU.

    python benchmarks/gpu/compiled.py     # sm_90: H100, H200

Prints registers, stack and instructions of each kernel and, for each loop over blocks, its fast
paths: global loads and stores with their widths in bits, and instructions per weight. Exits with 1
if registers are spilled in a loop.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rgp_optim import _triton

ARCH = 90
POINTERS = {"keys": "*i32", "ties": "*i32", "rooms": "*i32"}  # others are tables of int64
STATE = _triton.COUNTS.value + (1 << max(_triton.DIGITS))
SIZES = {name: getattr(_triton, name) for name in ("CHUNK", "BLOCK", "PIECE")}
MEMORY = re.compile(r"\b(LDG|STG)\.E\S*?(?:\.(?:[US]?(8|16)|(64|128)))?(?:\.\w+)* ")


def cases() -> dict[str, tuple[str, dict[str, int]]]:
    """Return the launches of a step: kernel and constants."""
    found = {}
    shift = 32
    for i, bits in enumerate(_triton.DIGITS):
        shift -= bits
        for read in ("GRADIENTS", "SCORES") if i == 0 else ("KEYS",):
            constants = {"SHIFT": shift, "BITS": bits, "READ": getattr(_triton, read).value}
            found[f"count {i + 1} {read.lower()}"] = "_count", {**constants, "STATE": STATE}
    found["mask"] = "_mask", {"STATE": STATE}
    found["merge"] = "_merge", {}
    return found


def compile_kernel(name: str, constants: dict[str, int]) -> bytes:
    """Return the machine code of a kernel."""
    kernel = getattr(_triton, name)
    constants = {**constants, **{n: v for n, v in SIZES.items() if n in kernel.arg_names}}
    signature = {
        arg: "constexpr" if arg in constants else POINTERS.get(arg, "*i64")
        for arg in kernel.arg_names
    }
    pointers = (i for i, kind in enumerate(signature.values()) if "*" in kind)
    # What the allocator returns begins at a multiple of 16.
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    target, options = GPUTarget("cuda", ARCH, 32), dict(_triton.OPTIONS)
    code = triton.compile(source, target=target, options=options)
    return bytes(code.asm["cubin"])


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return resources and machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = sorted(Path(triton.__file__).parent.rglob("cuobjdump"))
        tool = str(found[0]) if found else "cuobjdump"
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    return usage.stdout, sass.stdout


class Instruction(NamedTuple):
    """An instruction with its address and, for branches, where it goes."""

    address: int
    text: str
    target: int | None


def instructions(sass: str) -> list[Instruction]:
    found = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        found.append(Instruction(int(address, 16), text, int(branch[1], 16) if branch else None))
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the bodies of all loops."""
    ends = [each for each in code if each.target is not None and each.target < each.address]
    return [[i for i in code if end.target <= i.address <= end.address] for end in ends]


Access = tuple[tuple[str, int], ...]  # kinds of access, "LDG.128" say, with their numbers


def paths(body: list[Instruction]) -> dict[Access, int]:
    """Return the shortest way through a loop for each set of memory accesses."""
    index = {each.address: i for i, each in enumerate(body)}
    ways: list[dict[Access, int]] = [{} for _ in range(len(body) + 1)]
    ways[0][()] = 0
    for i, each in enumerate(body):
        access, always = MEMORY.search(each.text), "@" not in each.text
        jumps = each.target is not None
        leaves = always and (jumps or re.search(r"\b(EXIT|RET)\b", each.text))
        following = [] if leaves else [i + 1]
        if jumps and each.target > each.address and each.target in index:
            following.append(index[each.target])
        elif jumps and i + 1 == len(body):
            following = [i + 1]
        for accesses, length in ways[i].items():
            now = Counter(dict(accesses))
            if access:
                now[f"{access[1]}.{access[2] or access[3] or 32}"] += 1
            key = tuple(sorted(now.items()))
            for j in following:
                ways[j][key] = min(ways[j].get(key, length + 1), length + 1)
    return ways[len(body)]


def main() -> int:
    per_thread = SIZES["BLOCK"] // (32 * _triton.OPTIONS["num_warps"])
    print(f"triton {triton.__version__}, sm_{ARCH}, {per_thread} weights per thread and block")
    spilled = 0
    for label, (kernel, constants) in cases().items():
        usage, sass = disassemble(compile_kernel(kernel, constants))
        code = instructions(sass)
        bodies, rows = loops(code), {}
        spills = sum(bool(re.search(r"\b(LDL|STL)\b", i.text)) for body in bodies for i in body)
        spilled += spills
        resources = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
        print(
            f"{label}: {resources['REG']} registers, {resources['STACK']} B stack, "
            f"{resources['SHARED']} B shared, {len(code)} instructions, {spills} spills in loops"
        )
        for body in bodies:
            for accesses, length in paths(body).items():
                if any(".128" in kind for kind, _ in accesses):
                    shown = " ".join(f"{count}x{kind}" for kind, count in accesses)
                    rows[shown] = min(length, rows.get(shown, length))
        for shown, length in sorted(rows.items(), key=lambda row: row[1]):
            print(f"    {length / per_thread:6.1f} instructions per weight: {shown}")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
