"""Count what a training step sends between processes: calls and bytes, by kind of collective.

Starts 2 and 4 processes (gloo, on the CPU) and takes one step each of TRADES and of CURE under
DistributedDataParallel and FSDP2, with an attack of ``--steps`` steps. What is counted is what the
step asks for, whatever the backend makes of it; gloo does a reduce-scatter as an all-reduce.

python benchmarks/collectives.py [--network resnet18] [--csv FILE] [--table FILE]
"""

from __future__ import annotations

import argparse
import collections
import csv
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rgp_optim import RGPSelectiveOptimizer, kl_adv_loss, kl_attack

sys.path.insert(0, str(measure.ROOT / "examples"))
from networks import NETWORKS

RESULTS = measure.ROOT / "benchmarks" / "results" / "collectives.csv"
COLUMNS = (
    "commit", "date", "device", "torch", "network", "weights", "selected", "tensors", "wrapper",
    "processes", "method", "attack_steps", "purpose", "collective", "calls", "bytes",
)  # fmt: skip
METHODS = ("trades", "cure", "cure, no third loss", "cure, kept masks", "cure, compared")
# What a collective's buffer is, and how much of it a process sends in a ring of W, in (W - 1) / W.
SENT = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}

Counts = dict[tuple[str, str], list[int]]  # (purpose, collective): calls, bytes


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count the collectives of this process; those of a step's selection apart."""
    names = {"all_reduce": ["all_reduce"]}
    for kind, old in (("reduce_scatter", "_tensor"), ("all_gather", "_into_tensor")):
        names[kind] = [n for n in (f"{kind}_single", f"{kind}{old}") if hasattr(dist, n)][:1]
    patches = []
    for kind, (name,) in names.items():
        original = getattr(dist, name)

        def counted(*args, kind=kind, original=original, **kwargs):
            big = max((t for t in (*args, *kwargs.values()) if torch.is_tensor(t)), key=nbytes)
            add(counts, in_step[0], kind, nbytes(big))
            return original(*args, **kwargs)

        patches.append(patch.object(dist, name, counted))
    step = RGPSelectiveOptimizer.step
    in_step = ["passes"]

    def stepping(self, *args, **kwargs):
        in_step[0] = "selection"
        try:
            return step(self, *args, **kwargs)
        finally:
            in_step[0] = "passes"

    patches.append(patch.object(RGPSelectiveOptimizer, "step", stepping))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def add(counts: Counts, purpose: str, kind: str, size: int) -> None:
    entry = counts.setdefault((purpose, kind), [0, 0])
    entry[0] += 1
    entry[1] += size


def run_step(method, model, opt, attack_steps, x, y):
    x_adv = kl_attack(model, x, steps=attack_steps)
    logits, logits_adv = model(x), model(x_adv)
    loss = kl_adv_loss(logits, logits_adv, y)
    opt.zero_grad()
    if method == "trades":
        loss.backward()
    else:
        nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
        opt.backward(None if "no third" in method else loss, natural=nat, adversarial=adv)
    opt.step()


def count(rank, size, store, network, attack_steps, answers):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = {}
    for wrapper in ("DDP", "FSDP2"):
        for method in METHODS:
            torch.manual_seed(0)
            model = NETWORKS[network]()
            counts: Counts = {}
            active = [False]
            if wrapper == "FSDP2":
                blocks = [block for stage in model.stages for block in stage]
                called = [fully_shard(part) for part in (*blocks, model)][-1]
            else:
                called = DistributedDataParallel(model)

                def reduce(_, bucket, counts=counts, active=active):
                    if active[0]:
                        add(counts, "passes", "all_reduce", nbytes(bucket.buffer()))
                    flat = bucket.buffer().div_(size)
                    done = dist.distributed_c10d.all_reduce(flat, async_op=True)
                    return done.get_future().then(lambda future: future.value()[0])

                called.register_comm_hook(None, reduce)
            inner = torch.optim.SGD(model.parameters(), lr=0.01)
            checks = "always" if "compared" in method else "never"
            kept = 10 if "kept" in method else 1
            opt = (
                inner
                if method == "trades"
                else RGPSelectiveOptimizer(inner, check_ranks=checks, refresh_every=kept)
            )
            for step in range(3):  # DDP orders its buckets anew after the first
                active[0] = step == 2
                g = torch.Generator().manual_seed(10 * step + rank)
                x, y = torch.rand(2, 3, 16, 16, generator=g), torch.tensor([0, 1])
                with counting(counts if active[0] else {}):
                    run_step(method, called, opt, attack_steps, x, y)
            found[wrapper, method] = counts
    if rank == 0:
        answers.put(found)
        answers.close()
        answers.join_thread()
    dist.barrier()
    os._exit(0)


def rows_of(network: str, attack_steps: int, sizes: list[int]) -> list[dict[str, object]]:
    model = NETWORKS[network]()
    selected = [p for p in model.parameters() if p.dim() > 1]
    here = measure.environment(torch.device("cpu"))
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            answers = mp.get_context("spawn").Queue()
            store = Path(folder) / "store"
            work = (size, store, network, attack_steps, answers)
            processes = mp.spawn(count, work, nprocs=size, join=False)
            found = answers.get()
            processes.join()
        for (wrapper, method), counts in found.items():
            for (purpose, kind), (calls, total) in sorted(counts.items()):
                rows.append({
                    **{key: here[key] for key in ("commit", "date", "device", "torch")},
                    "network": network,
                    "weights": sum(p.numel() for p in model.parameters()),
                    "selected": sum(p.numel() for p in selected),
                    "tensors": len(selected),
                    "wrapper": wrapper,
                    "processes": size,
                    "method": method,
                    "attack_steps": attack_steps,
                    "purpose": purpose,
                    "collective": kind,
                    "calls": calls,
                    "bytes": total,
                })  # fmt: skip
    return rows


def selection(wrapper: str, selected: int, tensors: int, size: int) -> dict[str, tuple[int, int]]:
    """Return calls and bytes of the selection in one step, by the algorithm, to be checked.

    Eight bits of a score a round, a count of 8 bytes for each of 256 digits and each tensor; then a
    table of ties. Under DDP the two gradients come first, in buckets, and the masks last, as bits.
    """
    counts = {"all_reduce": (5, 8 * tensors * (4 * 256 + size))}
    if wrapper == "DDP":
        piece = math.ceil(selected / (8 * size)) * 8  # of one bucket
        counts["reduce_scatter"] = (2, 2 * 4 * piece * size)
        counts["all_gather"] = (1, piece * size // 8)
    return counts


def check(rows: list[dict[str, str]]) -> None:
    """Compare the counted rows with what the algorithm says."""
    seen = collections.Counter()
    for row in rows:
        if row["purpose"] == "selection" and row["method"] in ("cure", "cure, no third loss"):
            said = selection(
                row["wrapper"], int(row["selected"]), int(row["tensors"]), int(row["processes"])
            )
            got = int(row["calls"]), int(row["bytes"])
            assert said[row["collective"]] == got, (row, said)
            seen[row["wrapper"], row["method"], row["processes"]] += 1
    assert seen
    assert all(n == (3 if key[0] == "DDP" else 1) for key, n in seen.items()), seen


def sent(rows: list[dict[str, str]], wrapper: str, method: str, purpose: str, size: int) -> float:
    """Return the bytes that one process sends in a ring of ``size``, from the rows of 4.

    The buffers are those of 4 processes; only the selection's table of ties grows with their
    number.
    """
    total = 0.0
    for row in rows:
        key = row["wrapper"], row["method"], row["purpose"], int(row["processes"])
        if key == (wrapper, method, purpose, 4):
            size_of = float(row["bytes"])
            if purpose == "selection" and row["collective"] == "all_reduce" and size_of:
                size_of += 8 * int(row["tensors"]) * (size - 4)
            total += SENT[row["collective"]] * size_of * (size - 1) / size
    return total


def calls(rows: list[dict[str, str]], wrapper: str, method: str, purpose: str) -> int:
    keys = ("wrapper", "method", "purpose", "processes")
    want = (wrapper, method, purpose, "4")
    return sum(int(row["calls"]) for row in rows if tuple(row[key] for key in keys) == want)


def table(rows: list[dict[str, str]], sizes: tuple[int, ...] = (8, 64, 1024)) -> str:
    """Return Markdown: what one process sends in a step, by number of processes."""
    lines = [
        "| | calls: passes + selection | " + " | ".join(f"{n:,} GPUs" for n in sizes) + " |",
        "|" + " --- |" * (2 + len(sizes)),
    ]
    for wrapper in ("DDP", "FSDP2"):
        for method in METHODS:
            each = [calls(rows, wrapper, method, purpose) for purpose in ("passes", "selection")]
            cells = []
            for size in sizes:
                both = [sent(rows, wrapper, method, p, size) for p in ("passes", "selection")]
                cells.append(f"{both[0] / 1e6:,.1f} + {both[1] / 1e6:,.1f} MB")
            lines.append(f"| {wrapper}, {method} | {each[0]} + {each[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18", choices=NETWORKS)
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    parser.add_argument(
        "--table", type=Path, help="print the table of COLLECTIVES.md from this file"
    )
    args = parser.parse_args()
    if args.table:
        print(table(read(args.table)))
        return
    rows = rows_of(args.network, args.steps, [int(n) for n in args.processes.split(",")])
    texts = [{key: str(value) for key, value in row.items()} for row in rows]
    check(texts)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for row in texts:
        print(*(row[key].ljust(20) for key in COLUMNS[8:]))


if __name__ == "__main__":
    main()
