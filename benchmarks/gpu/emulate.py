"""Run the compiled kernels instruction by instruction on a CPU, against the reference.

    python benchmarks/gpu/emulate.py                            # sm_90: H100, H200
    python benchmarks/gpu/emulate.py --arch 80,90,100,120 --csv benchmarks/gpu/emulated.csv
    python benchmarks/gpu/emulate.py --table                    # of the rows in that file

Prints each case that differs from the reference, reaches where it must not, or races, and exits
with 1 then; else a table of what a step on one tensor executes and moves. See emulator/README.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "select"))

import measure
from emulator.launcher import emulated
from emulator.machine import Machine
from emulator.parse import Fault
from test_backends import CASES, LAYOUTS, ONE_TERM, heavy, special

from rgp_optim import _reference, _triton
from rgp_optim._reference import Entry, Masking

COUNTED = 8 * _triton.CHUNK  # weights of the tensor whose step is counted
# The launches of a step, with the bytes per weight that each has to move: per byte of the
# gradients' dtype, and of keys and masks.
STEP = {f"count {i + 1}": (0, 4) for i in range(len(_triton.DIGITS))} | {"count 1": (2, 4)}
STEP |= {"mask": (0, 5), "zero and save": (4, 1), "restore": (3, 1)}
COLUMNS = (
    "commit", "date", "torch", "triton", "arch", "seed", "cases", "right", "kernel", "dtype",
    "weights", "warp_instructions", "read_bytes", "write_bytes", "atomic_bytes",
)  # fmt: skip


class Case(NamedTuple):
    """What a selection gets, or zeroing, saving and restoring."""

    name: str
    rows: list[Entry] | list[Masking]


def selection(
    name: str, pairs: Any, alpha: float | None = 0.1, fraction: float = 0.5, shared: bool = False
) -> Case:
    """Return a selection; without alpha one of each pair has the scores."""
    if alpha is None:
        pairs = [(a if b is None else b, None) for a, b in pairs]
    pools = cycle([0]) if shared else range(len(pairs))
    rows = [Entry(*pair, alpha, fraction, i) for i, pair in zip(pools, pairs, strict=False)]
    return Case(name + ", scores" * (alpha is None), rows)


def draws(seed: int) -> Callable[..., list[Tensor]]:
    """Return a function that draws gradients of a shape."""
    return lambda *n, count=2, **kw: [heavy(*n, seed=seed + i, **kw) for i in range(count)]


def cases(seed: int) -> Iterator[Case]:
    """Yield selections, then merges."""
    block, chunk, draw = _triton.BLOCK, _triton.CHUNK, draws(seed)
    around = [n + more for n in (block, chunk) for more in (-1, 0, 1)]
    for n in (1, 7, 255, 1024, 5000, *around, 70001):
        yield selection(f"{n} weights", [draw(n)])
    for name, make in CASES.items():
        if "float64" not in name:  # not for the kernels
            yield selection(name, make(5000), shared=True)
            if name in ONE_TERM:
                yield selection(name, make(5000), None)
    for fraction in (0.0, 1e-9, 0.001, 0.999, 1.0):
        for name in ("heavy-tailed", "mostly zeros"):
            yield selection(f"{name}, update {fraction}", CASES[name](5000), 0.1, fraction)
    for alpha in (0.0, 1.0):
        yield selection(f"alpha {alpha}", CASES["special values"](5000), alpha)
    for name in ("ties", "all equal"):  # in several chunks
        yield selection(f"{name} of 70000", CASES[name](70000))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base, other = draw(40003, dtype=dtype)
        yield selection(f"misaligned, {dtype}", [(base[3:], other[1:-2])])
        for n in (37, block, 34000):
            pair = special(n, seed).to(dtype), special(n, seed + 1).to(dtype)
            for alpha in (0.1, None):
                yield selection(f"{n} special values, {dtype}", [pair], alpha)
    four = [g.view(7, 8, 9, 80).permute(3, 1, 0, 2) for g in draw(40320)]
    yield selection("four dimensions", [four])
    shapes = ((64, 3, 3, 3), (64,), (128, 64, 3, 3), (10, 512), (1, 1), (0, 4), (33, 77))
    many = [draw(*shape, count=3) for shape in shapes]
    pairs = [g[:2] for g in many]
    yield selection("many tensors", pairs)
    yield selection("many tensors, all together", pairs, shared=True)
    two = zip(pairs, cycle([(0.1, 0.3, 0), (0.7, 0.6, 1)]), strict=False)
    yield Case("two pools", [Entry(*pair, *rest) for pair, rest in two])
    layouts = LAYOUTS | {"sliced": lambda t: t[:, 1:3]}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for name, lay in layouts.items():
            g, w = (lay(t) for t in draw(30, 5, 9, 7, dtype=dtype))
            yield Case(f"merge, {name}, {dtype}", [(g > 0, g, w)])
        g, w = (special(70001, seed + i).to(dtype) for i in range(2))
        yield Case(f"merge of 70001, {dtype}", [(g > 0, g, w)])
    yield Case("merge of many", [(a > 0, g, w) for a, g, w in many])
    yield Case("merge without gradients", [(a > 0, None, w) for a, _, w in many])
    yield Case("merge without weights", [(a > 0, g, None) for a, g, _ in many])


def copied(t: Tensor) -> Tensor:
    """Return a copy that lies in memory as the tensor does."""
    size = t.untyped_storage().nbytes() // t.element_size()
    whole = t.as_strided((size,), (1,), 0).clone()
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def found(module: ModuleType, case: Case) -> list[Any]:
    """Return what a backend makes of a case, and what it leaves of its tensors."""
    rows: Any = tree_map_only(Tensor, copied, case.rows)
    if isinstance(rows[0], Entry):
        return tree_leaves((rows, module.select(rows)))
    saved = module.zero_and_save_(rows)
    kept = [(m, w, s) for (m, _, w), s in zip(rows, saved, strict=True) if w is not None]
    for _, weight, _ in kept:
        weight.mul_(1.5)
    module.restore_(kept)
    return tree_leaves((rows, saved))


def bits(leaf: Any) -> Any:
    """Return what tells a tensor from another."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.shape, leaf.dtype, leaf.flatten().contiguous().view(torch.uint8).numpy().tobytes()


def fault(kernels: ModuleType, case: Case, machine: Machine, arch: int) -> str | None:
    """Say what is wrong with the kernels in a case."""
    try:
        with emulated(machine, arch):
            got = found(kernels, case)
    except Fault as error:
        return str(error)
    same = [*map(bits, got)] == [*map(bits, found(_reference, case))]
    return None if same else "differs from the reference"


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


def counts(kernels: ModuleType, arch: int, seed: int) -> list[dict[str, Any]]:
    """Return what each launch of a step on one tensor does."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        machine, (nat, adv, weight) = Machine(seed), draws(seed)(COUNTED, count=3, dtype=dtype)
        chosen = selection("a step", [(nat, adv)])
        (mask,) = _reference.select(chosen.rows)
        for case in (chosen, Case("a step", [(mask, adv, weight)])):
            if wrong := fault(kernels, case, machine, arch):
                raise Fault(wrong)
        what = {"dtype": str(dtype).removeprefix("torch."), "weights": COUNTED}
        for kernel, launch in zip(STEP, machine.launches, strict=True):
            rows.append({"kernel": kernel} | what | launch)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of rows: bytes and instructions of a thread, per weight."""
    archs = sorted({int(row["arch"]) for row in rows})
    head = ["Triton, dtype", "kernel", "bytes, predicted", "bytes", *(f"sm_{a}" for a in archs)]
    lines = [head, ["---"] * len(head)]
    for key in dict.fromkeys((row["triton"], row["dtype"], row["kernel"]) for row in rows):
        same = [r for r in rows if (r["triton"], r["dtype"], r["kernel"]) == key]
        gradients, others = STEP.get(key[2], (0, 4))
        predicted = gradients * (4 if key[1] == "float32" else 2) + others
        moved = max(sum(int(row[name]) for name in COLUMNS[-3:]) for row in same) / COUNTED
        issued = {int(r["arch"]): 32 * int(r["warp_instructions"]) / COUNTED for r in same}
        cells = [f"{issued[a]:.1f}" if a in issued else "" for a in archs]
        lines.append([", ".join(key[:2]), key[2], str(predicted), f"{moved:.1f}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def main() -> int:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    add = parser.add_argument
    add("--arch", type=lambda archs: [int(a) for a in archs.split(",")], default=[90])
    add("--seed", type=int, default=0, help="of the data, and of whose turn it is")
    add("--only", action="append", help="a case by its name, without counts; can be repeated")
    add("--kernels", type=Path, help="a file in place of rgp_optim/_triton.py")
    add("--csv", type=Path, help="append the counts of a step to this file")
    add("--table", action="store_true", help="print the committed counts, and run nothing")
    args = parser.parse_args()
    if args.table:
        with Path(__file__).with_name("emulated.csv").open(newline="") as file:
            print(table([*csv.DictReader(file)]))
        return 0
    if reason := unable():
        print(f"not able to compile: {reason}")
        return 3
    kernels, rows = loaded(args.kernels) if args.kernels else _triton, []
    where = {"commit": measure.commit(), "date": datetime.date.today().isoformat()}
    where |= {"torch": torch.__version__, "triton": triton.__version__, "seed": args.seed}
    failed = 0
    for arch in args.arch:
        count, right = run(kernels, arch, args.seed, args.only or [])
        failed += count - right
        if count == right and not args.only:
            ran = where | {"arch": arch, "cases": count, "right": right}
            rows += [ran | row for row in counts(kernels, arch, args.seed)]
    if rows:
        print(table(rows))
    if args.csv is not None:
        fresh = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader() if fresh else None
            writer.writerows(rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
