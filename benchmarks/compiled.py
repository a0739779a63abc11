"""What the compiler makes of the kernels, for a GPU that need not be here.

    python benchmarks/compiled.py                 # sm_90: H100, H200
    python benchmarks/compiled.py --arch 80       # A100

Prints, for each kernel and dtype, as a step of all tensors launches it: registers, stack (spills
are there), shared memory, instructions in all and in the innermost loop with the widest loads (of
`_mask` with all its branches), barriers in it, and how wide the loads and stores of global memory
are. 128 is four float32 at once. `--sass FOLDER` keeps the machine code.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rgp_optim import _kernels

I64, I32, F32 = "*i64", "*i32", "*fp32"
TABLES = {"tensors": I64, "shares": F32, "addresses": I64}
CHUNKS = {"chunk_tensor": I32, "chunk_start": I64}
POOLS = {"pools": I64, "state": I64}
SIGNATURES = {
    "_bracket": {**POOLS, **TABLES, "run_tensor": I32, "run_start": I64},
    "_count": {**POOLS, **TABLES, **CHUNKS, "counts": I64},
    "_mask": {**POOLS, **TABLES, **CHUNKS, "entries": I64, "bits": I32},
    "_resolve": {**POOLS, **TABLES, **CHUNKS, "entries": I64, "bits": I32},
    "_use_bits": {**TABLES, **CHUNKS, "bits": I32},
}
EACH = _kernels.EACH.value
CONSTANTS: dict[str, dict[str, object]] = {
    "_count": {"ALIGNED": True, "BOTH": True},
    "_mask": {"ALIGNED": True, "BOTH": True, "TARGET": EACH, "SAVED": EACH},
}
CODES = {"float32": 0, "bfloat16": 1, "mixed": _kernels.MIXED}


def compile_kernel(name: str, code: int, arch: int, what: int | None) -> dict[str, Any]:
    """Return a kernel in all forms that the compiler has of it."""
    kernel = getattr(_kernels, name)
    options = dict(_kernels.OPTIONS[name])
    constants = {"CODE": code, **CONSTANTS.get(name, {})}
    if "THREADS" in kernel.arg_names:
        constants["THREADS"] = 32 * options["num_warps"]
    if code < 0:
        constants = {key: value and key != "ALIGNED" for key, value in constants.items()}
        constants["CODE"] = code
    if what is not None:
        constants["WHAT"] = what
    kinds = {**SIGNATURES[name], **dict.fromkeys(constants, "constexpr")}
    signature = {arg: kinds[arg] for arg in kernel.arg_names}
    number = {arg: i for i, arg in enumerate(signature)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(number[arg],): value for arg, value in constants.items()},
        # What the allocator returns begins at a multiple of 16.
        attrs={(number[a],): [["tt.divisibility", 16]] for a, k in signature.items() if "*" in k},
    )
    target = GPUTarget("cuda", arch, 32)
    forms: dict[str, Any] = triton.compile(source, target=target, options=options).asm
    return forms


def in_place(ttgir: str) -> bool:
    """Tell whether each thread of `_mask` writes only where it has read, whatever it writes over.

    Gradients, weights and what is saved may share memory; all have one layout then.
    """
    block = _kernels.MASK_BLOCK.value // 32
    accesses = re.findall(rf"tt\.(?:load|store).*tensor<{block}x32x!tt\.ptr<\w+>, (#\w+)>", ttgir)
    return len(accesses) >= 5 and len(set(accesses)) == 1


def tool(name: str) -> str:
    """Return the path of one of the CUDA tools that come with triton."""
    found = sorted(Path(triton.__file__).parent.rglob(name))
    return str(found[0]) if found else name


def describe(cubin: bytes, keep: Path | None = None) -> dict[str, str]:
    """Read resources and memory instructions from machine code; keep it as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(tool("cuobjdump"), "-res-usage", file.name)
        sass = run(tool("cuobjdump"), "-sass", file.name)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(sass)
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
        "spills": hot_loop(sass)[1],
        "barriers": hot_loop(sass)[2],
        "loads": summary(widths["LDG"]),
        "stores": summary(widths["STG"]),
    }


def hot_loop(sass: str) -> tuple[str, str, str]:
    """Return the size of the innermost loop with the widest loads, its spills and its barriers."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    loops = []
    for address, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in lines if int(target[1], 16) <= a <= address]
            if any(re.search(r"LDG\.E\S*\.128", t) for t in body):
                loops.append(body)
    if not loops:
        return "-", "-", "-"
    body = min(loops, key=len)
    spills, barriers = (
        sum(bool(re.search(rf"\b({ops})\b", t)) for t in body) for ops in ("LDL|STL", "BAR")
    )
    return str(len(body)), str(spills), str(barriers)


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
    parser.add_argument("--sass", type=Path, metavar="FOLDER", help="keep the machine code here")
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}, sm_{args.arch}, all tensors aligned")
    columns = ("registers", "stack", "shared", "instructions", "loop", "spills", "barriers")
    print(f"{'kernel':<22}{'dtype':<10}" + "".join(f"{c:>14}" for c in columns) + "  loads; stores")
    for name in args.kernels:
        for what in (0, 1, 2) if name == "_use_bits" else (None,):
            for dtype in args.dtypes:
                code = CODES[dtype]
                label = name if what is None else f"{name} {('conserve', 'mask', 'expand')[what]}"
                keep = args.sass and args.sass / f"{label.replace(' ', '-')}-{dtype}.sass"
                forms = compile_kernel(name, code, args.arch, what)
                found = describe(forms["cubin"], keep)
                numbers = "".join(f"{found[c]:>14}" for c in columns)
                print(f"{label:<22}{dtype:<10}{numbers}  {found['loads']}; {found['stores']}")
                if name == "_mask" and not in_place(forms["ttgir"]):
                    sys.exit("_mask: a thread may write over what another has yet to read")


if __name__ == "__main__":
    main()
