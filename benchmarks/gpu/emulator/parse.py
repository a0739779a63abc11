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
    guard: str  # the predicate register, or ""
    name: str  # "ld.global.v4" of "ld.global.v4.b32"
    kind: str  # "b32"
    operands: tuple[str, ...]


class Listing(NamedTuple):
    """A kernel."""

    parameters: list[str]
    threads: int
    registers: dict[str, str]  # types
    code: list[Instruction]
    labels: dict[str, int]  # positions in the code


def parse(ptx: str) -> Listing:
    """Return the only kernel of a module."""
    text = re.sub(r"//.*|^\s*\.(?:loc|file|pragma)\b.*", "", ptx, flags=re.M)
    head, _, rest = text[text.index(".entry") :].partition("{")
    threads = re.search(r"\.reqntid (\d+)", head)
    if threads is None or text.count(".entry") != 1 or ".func" in text:
        raise Fault("a module should have one kernel, of a known number of threads")
    registers, code, labels = {}, [], {}
    for line in map(str.strip, re.split(r"[;\n]", rest.partition("\n}")[0])):
        if line.startswith(".reg"):
            kind, prefix, count = re.findall(r"\w+", line)[1:]
            registers |= {f"%{prefix}{i}": kind for i in range(int(count))}
        elif line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif line not in ("", "{", "}"):  # scopes of inline assembly
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
            if found is None:
                raise Fault(f"no such instruction: {line}")
            negation, guard, mnemonic, operands = found.groups()
            name, _, kind = mnemonic.rpartition(".")
            parts = tuple(re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands))
            text = " ".join(line.split())
            code.append(Instruction(text, bool(negation), guard or "", name, kind, parts))
    return Listing(re.findall(r"\w+_param_\d+", head), int(threads[1]), registers, code, labels)
