"""What the compiler makes of the kernels, for a GPU that need not be here.

    python benchmarks/compiled.py                 # sm_90: H100, H200
    python benchmarks/compiled.py --arch 80       # A100

Prints, for each kernel and dtype: registers, stack (spills are there), shared memory, instructions
in all and in the innermost loop with the widest loads (of `_mask` with all its branches), and how
wide the loads and stores of global memory are. 128 is four float32 at once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rgp_optim import _triton

I64, I32, F32 = "*i64", "*i32", "*fp32"
TABLES = {"tensors": I64, "shares": F32, "addresses": I64}
CHUNKS = {"chunk_tensor": I32, "chunk_start": I64}
SIGNATURES = {
    "_bracket": {"pools": I64, **TABLES, "run_tensor": I32, "run_start": I64, "state": I64},
    "_count": {"pools": I64, **TABLES, **CHUNKS, "counts": I64, "state": I64},
    "_mask": {
        "pools": I64,
        **TABLES,
        **CHUNKS,
        "list_keys": I32,
        "list_slots": I64,
        "state": I64,
        "bits": I32,
    },
    "_use_bits": {"tensors": I64, "addresses": I64, **CHUNKS, "bits": I32},
}
CODES = {"float32": 0, "bfloat16": 1, "mixed": _triton.MIXED}


def compile_kernel(name: str, code: int, arch: int, aligned: bool, what: int | None) -> bytes:
    """Return the machine code of a kernel."""
    constants: dict[str, object] = {"CODE": code}
    if name != "_bracket":
        constants["ALIGNED"] = aligned
    if what is not None:
        constants["WHAT"] = what
    kernel = getattr(_triton, name)
    signature = {**SIGNATURES[name], **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={arg: signature[arg] for arg in kernel.arg_names},
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
    )
    options = _triton.OPTIONS[name]
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]


def tool(name: str) -> str:
    """Return the path of one of the CUDA tools that come with triton."""
    found = sorted(Path(triton.__file__).parent.rglob(name))
    return str(found[0]) if found else name


def describe(cubin: bytes) -> dict[str, str]:
    """Read resources and memory instructions from machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(tool("cuobjdump"), "-res-usage", file.name)
        sass = run(tool("cuobjdump"), "-sass", file.name)
    widths: dict[str, Counter[str]] = {"LDG": Counter(), "STG": Counter()}
    for op, rest in re.findall(r"\b(LDG|STG)\.E([.\w]*)", sass):
        width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", rest)
        widths[op][width.group(1).lstrip("US") if width else "32"] += 1
    fields = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
    return {
        "registers": fields.get("REG", "?"),
        "stack": fields.get("STACK", "?"),
        "shared": fields.get("SHARED", "?"),
        "instructions": str(len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))),
        "loop": hot_loop(sass)[0],
        "spills in it": hot_loop(sass)[1],
        "loads": summary(widths["LDG"]),
        "stores": summary(widths["STG"]),
    }


def hot_loop(sass: str) -> tuple[str, str]:
    """Return the size of the innermost loop with the widest loads, and its accesses to spills."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    loops = []
    for address, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in lines if int(target[1], 16) <= a <= address]
            if any(re.search(r"LDG\.E\S*\.128", t) for t in body):
                loops.append(body)
    if not loops:
        return "-", "-"
    body = min(loops, key=len)
    return str(len(body)), str(sum(bool(re.search(r"\b(LDL|STL)\b", t)) for t in body))


def summary(widths: Counter[str]) -> str:
    return " ".join(
        f"{count}x{width}" for width, count in sorted(widths.items(), key=lambda w: -int(w[0]))
    )


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the dot")
    parser.add_argument("--kernels", nargs="+", choices=tuple(SIGNATURES), default=SIGNATURES)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(CODES), default=CODES)
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}, sm_{args.arch}, aligned tensors")
    columns = ("registers", "stack", "shared", "instructions", "loop", "spills in it")
    print(f"{'kernel':<22}{'dtype':<10}" + "".join(f"{c:>14}" for c in columns) + "  loads; stores")
    for name in args.kernels:
        for what in (0, 1, 2) if name == "_use_bits" else (None,):
            for dtype in args.dtypes:
                code = CODES[dtype]
                found = describe(compile_kernel(name, code, args.arch, code >= 0, what))
                label = name if what is None else f"{name} {('conserve', 'mask', 'expand')[what]}"
                numbers = "".join(f"{found[c]:>14}" for c in columns)
                print(f"{label:<22}{dtype:<10}{numbers}  {found['loads']}; {found['stores']}")


if __name__ == "__main__":
    main()
