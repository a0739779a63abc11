"""Run the compiled kernels instruction by instruction on a CPU, against the reference.

    python benchmarks/gpu/emulate.py                            # sm_90: H100, H200
    python benchmarks/gpu/emulate.py --arch 80,90,100,120 --csv benchmarks/gpu/emulated.csv
    python benchmarks/gpu/emulate.py --table                    # of the rows in that file

Prints each case that differs from the reference, reaches where it must not, or races, and exits
with 1 then. The rows count what a step does to one tensor. See emulator/README.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "select"))

import measure
from emulator.launcher import emulated
from emulator.machine import Machine
from emulator.parse import Fault
from test_backends import CASES, LAYOUTS, ONE_TERM, heavy, special

from rgp_optim import _reference, _triton

COUNTED = 8 * _triton.CHUNK  # weights of the tensor whose step is counted
# The launches of a step, with the bytes per weight that each has to move: per element of the
# gradients' dtype, and of the keys and masks.
STEP = [f"count {i + 1}" for i in range(len(_triton.DIGITS))] + ["mask", "zero and save", "restore"]
BYTES = {"count 1": (2, 4), "mask": (0, 5), "zero and save": (4, 1), "restore": (3, 1)}
COLUMNS = (
    "commit", "date", "torch", "triton", "arch", "seed", "cases", "right", "kernel", "dtype",
    "weights", "warp_instructions", "read_bytes", "write_bytes", "atomic_bytes",
)  # fmt: skip


class Case(NamedTuple):
    """Columns of a function of `_reference`; of a merge: masks, gradients, weights."""

    name: str
    function: str
    columns: tuple[Sequence[Any], ...]


def selection(
    name: str, pairs: Sequence[Any], alphas: Any = 0.3, fractions: Any = 0.4, pools: Any = None
) -> Case:
    """Return a selection; without alphas the first of each pair are given scores."""
    count = len(pairs)
    every = [x if isinstance(x, list) else [x] * count for x in (alphas, fractions)]
    rest = every[1], list(range(count)) if pools is None else [0] * count if pools == 0 else pools
    if alphas is None:
        return Case(
            f"{name}, scores", "topk_masks", ([b if a is None else a for a, b in pairs], *rest)
        )
    return Case(name, "select", (*zip(*pairs, strict=True), every[0], *rest))


def cases(seed: int) -> Iterator[Case]:
    """Yield selections, then merges."""
    block, chunk = _triton.BLOCK, _triton.CHUNK
    for n in (
        1,
        7,
        255,
        1024,
        block - 1,
        block,
        block + 1,
        5000,
        chunk - 1,
        chunk,
        chunk + 1,
        70001,
    ):
        yield selection(f"{n} weights", [(heavy(n, seed=seed), heavy(n, seed=seed + 1))])
    for name, draw in CASES.items():
        if "float64" not in name:  # not for the kernels
            yield selection(name, draw(5000), pools=0)
            if name in ONE_TERM:
                yield selection(name, draw(5000), None)
    for fraction in (0.0, 1e-9, 0.001, 0.999, 1.0):
        for name in ("heavy-tailed", "mostly zeros"):
            yield selection(f"{name}, update {fraction}", CASES[name](5000), 0.1, fraction)
    for alpha in (0.0, 1.0):
        yield selection(f"alpha {alpha}", CASES["special values"](5000), alpha)
    for name in ("ties", "all equal"):  # in several chunks
        yield selection(f"{name} of 70000", CASES[name](70000))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        what = str(dtype).removeprefix("torch.")
        base, other = (heavy(40003, seed=seed + i, dtype=dtype) for i in (2, 3))
        yield selection(f"misaligned, {what}", [(base[3:], other[1:-2])])
        for n in (37, block, 34000):
            odd, even = special(n, seed).to(dtype), special(n, seed + 1).to(dtype)
            yield selection(f"{n} special values, {what}", [(odd, even)])
            yield selection(f"{n} special values, {what}", [(odd, even)], None)
    four = [heavy(40320, seed=seed + i).view(7, 8, 9, 80).permute(3, 1, 0, 2) for i in range(2)]
    yield selection("four dimensions", [four])
    shapes = ((64, 3, 3, 3), (64,), (128, 64, 3, 3), (10, 512), (1, 1), (0, 4), (33, 77))
    nats, advs, weights = ([heavy(*s, seed=seed + i) for s in shapes] for i in range(3))
    many = [*zip(nats, advs, strict=True)]
    yield selection("many tensors", many)
    yield selection("many tensors, all together", many, pools=0)
    yield selection(
        "two pools", many, [0.1, 0.7] * 3 + [0.2], [0.3, 0.6] * 3 + [0.3], [0, 1] * 3 + [0]
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        what = str(dtype).removeprefix("torch.")
        layouts = LAYOUTS | {"sliced": lambda t: t[:, 1:3]}
        for name, lay in layouts.items():
            w, g = (lay(heavy(30, 5, 9, 7, seed=seed + i, dtype=dtype)) for i in range(2))
            yield Case(f"merge, {name}, {what}", "merge", ([g > 0], [g], [w]))
        w, g = (special(70001, seed + i).to(dtype) for i in range(2))
        yield Case(f"merge of 70001, {what}", "merge", ([g > 0], [g], [w]))
    masks, nothing = [g > 0 for g in nats], [None] * len(nats)
    yield Case("merge of many", "merge", (masks, advs, weights))
    yield Case("merge without gradients", "merge", (masks, nothing, weights))
    yield Case("merge without weights", "merge", (masks, advs, nothing))


def copied(column: Sequence[Any]) -> list[Any]:
    """Return copies of tensors, as they lie in memory."""
    found = []
    for t in column:
        if isinstance(t, Tensor):
            memory = t.untyped_storage().clone()
            t = t.new_empty(0).set_(memory, t.storage_offset(), t.shape, t.stride())
        found.append(t)
    return found


def called(module: ModuleType, case: Case, machine: Machine) -> list[Tensor | None]:
    """Return what a backend's functions make of a case, on a copy."""
    columns = [copied(column) for column in case.columns]
    for t in tree_leaves(columns):
        if isinstance(t, Tensor):
            machine.memory.add(t)
    if case.function != "merge":
        found: list[Tensor | None] = getattr(module, case.function)(*columns)
        return found
    masks, gradients, weights = columns
    saved = module.zero_and_save_(masks, gradients, weights)
    kept = [(m, w, s) for m, w, s in zip(masks, weights, saved, strict=True) if w is not None]
    for _, weight, _ in kept:
        weight.mul_(1.5)
    module.restore_(*zip(*kept, strict=True)) if kept else None
    return [*gradients, *weights, *saved]


def fault(kernels: ModuleType, case: Case, machine: Machine, arch: int) -> str | None:
    """Say what is wrong with a backend in a case."""
    want = called(_reference, case, Machine())
    try:
        with emulated(machine, arch):
            got = called(kernels, case, machine)
    except Fault as error:
        return str(error)
    same = all(bits(a) == bits(b) for a, b in zip(got, want, strict=True))
    return None if same else "differs from the reference"


def bits(t: Tensor | None) -> Any:
    """Return what tells a tensor from another."""
    return (
        t
        if t is None
        else (t.shape, t.dtype, t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    )


def counts(arch: int, seed: int) -> list[dict[str, Any]]:
    """Return the rows of a step on one tensor: what each launch does."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        machine = Machine(seed)
        nat, adv, weight = (heavy(COUNTED, seed=seed + i, dtype=dtype) for i in range(3))
        chosen = selection("a step", [(nat, adv)], 0.1, 0.5)
        (mask,) = called(_reference, chosen, Machine())
        for case in (chosen, Case("a step", "merge", ([mask], [adv], [weight]))):
            wrong = fault(_triton, case, machine, arch)
            if wrong is not None:
                raise Fault(wrong)
        name = str(dtype).removeprefix("torch.")
        for kernel, launch in zip(STEP, machine.launches, strict=True):
            rows.append({"kernel": kernel, "dtype": name, "weights": COUNTED} | launch)
    return rows


def table(path: Path) -> str:
    """Return the rows of a file as a table: bytes and instructions of a thread, per weight."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    archs = sorted({int(row["arch"]) for row in rows})
    head = ["Triton, dtype", "kernel", "bytes, predicted", "bytes", *(f"sm_{a}" for a in archs)]
    lines = [head, ["---"] * len(head)]
    for key in dict.fromkeys((row["triton"], row["dtype"], row["kernel"]) for row in rows):
        found = {int(r["arch"]): r for r in rows if (r["triton"], r["dtype"], r["kernel"]) == key}
        gradients, others = BYTES.get(key[2], (0, 4))
        predicted = gradients * (4 if key[1] == "float32" else 2) + others
        moved = [sum(int(r[name]) for name in COLUMNS[-3:]) for r in found.values()]
        issued = {arch: 32 * int(r["warp_instructions"]) for arch, r in found.items()}
        counted = [f"{issued[a] / COUNTED:.1f}" if a in issued else "" for a in archs]
        line = [", ".join(key[:2]), key[2], str(predicted), f"{max(moved) / COUNTED:.1f}", *counted]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def unable() -> str | None:
    """Say why nothing can be compiled here."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6"
    if "nvidia" not in triton.backends.backends:
        return "this Triton has no compiler for NVIDIA's GPUs"
    return None


def loaded(path: Path) -> ModuleType:
    """Return a version of `rgp_optim._triton` from another file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(kernels: ModuleType, arch: int, seed: int, only: Sequence[str]) -> tuple[int, int]:
    """Run cases, and print what is wrong; return how many there are, and how many are right."""
    start, count, right, instructions = time.perf_counter(), 0, 0, 0
    for case in cases(seed):
        if not only or case.name in only:
            machine = Machine(seed + count)
            wrong = fault(kernels, case, machine, arch)
            count, right = count + 1, right + (wrong is None)
            instructions += sum(launch["warp_instructions"] for launch in machine.launches)
            if wrong is not None:
                print(f"{kernels.__name__}, sm_{arch}, {case.name}: {wrong}", flush=True)
    print(
        f"Triton {triton.__version__}, sm_{arch}: {right} of {count} cases of {kernels.__name__} "
        f"right, {instructions:,} warp instructions, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return count, right


def main(argv: Sequence[str] | None = None) -> int:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    add = parser.add_argument
    add("--arch", type=lambda archs: [int(a) for a in archs.split(",")], default=[90])
    add("--seed", type=int, default=0, help="of the data, and of whose turn it is")
    add("--only", action="append", default=[], help="a case by its name; can be repeated")
    add("--kernels", type=Path, help="a file in place of rgp_optim/_triton.py")
    add("--csv", type=Path, help="append the counts of a step to this file")
    add("--table", action="store_true", help="print the committed counts, and run nothing")
    args = parser.parse_args(argv)
    if args.table:
        print(table(Path(__file__).with_name("emulated.csv")))
        return 0
    reason = unable()
    if reason is not None:
        print(f"not able to compile: {reason}")
        return 3
    failed = 0
    for arch in args.arch:
        kernels = loaded(args.kernels) if args.kernels else _triton
        count, right = run(kernels, arch, args.seed, args.only)
        failed += count - right
        if args.csv is not None and not failed:
            where = {"commit": measure.commit(), "date": datetime.date.today().isoformat()}
            where |= {"torch": torch.__version__, "triton": triton.__version__}
            where |= {"arch": arch, "seed": args.seed, "cases": count, "right": right}
            keep(args.csv, [where | row for row in counts(arch, args.seed)])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
