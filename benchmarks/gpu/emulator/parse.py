"""Read the text of a kernel in PTX."""

from __future__ import annotations

import re
from typing import NamedTuple


class Fault(Exception):
    """What a kernel must not do, or what is not emulated."""


class Instruction(NamedTuple):
    """One instruction; its operands are registers, numbers, names, {...} and [...]."""

    text: str
    negated: bool  # "@!%p1" rather than "@%p1"
    guard: str  # a predicate's register, or ""
    name: str  # "ld.global.v4" of "ld.global.v4.b32"
    kind: str  # "b32"
    operands: tuple[str, ...]


class Listing(NamedTuple):
    """A kernel."""

    threads: int
    registers: dict[str, str]  # types
    code: list[Instruction]
    labels: dict[str, int]  # positions in the code


def parse(ptx: str) -> Listing:
    """Return the kernel of a module that has one."""
    text = re.sub(r"//.*|^\s*\.(?:loc|file|pragma)\b.*", "", ptx, flags=re.M)
    head, _, rest = text[text.index(".entry") :].partition("{")
    kernel = Listing(int(re.findall(r"\.reqntid (\d+)", head)[0]), {}, [], {})
    for line in map(str.strip, re.split(r"[;\n]", rest.partition("\n}")[0])):
        if line.startswith(".reg"):
            kind, prefix, count = re.findall(r"\w+", line)[1:]
            kernel.registers.update({f"%{prefix}{i}": kind for i in range(int(count))})
        elif line.endswith(":"):
            kernel.labels[line[:-1]] = len(kernel.code)
        elif line not in ("", "{", "}"):  # scopes of inline assembly
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
            if found is None:
                raise Fault(f"no such instruction: {line}")
            name, _, kind = found[3].rpartition(".")
            operands = tuple(re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", found[4]))
            text, guard = " ".join(line.split()), found[2] or ""
            kernel.code.append(Instruction(text, found[1] == "!", guard, name, kind, operands))
    return kernel
