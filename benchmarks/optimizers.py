"""Test optimizers of other packages under the wrapper; one row for each in optimizers.csv.

``python benchmarks/optimizers.py [--only NAME]``. Packages that are not installed are named and
left out. Columns hold ``yes``, ``no`` with what was found, or ``refused`` with the message:

- all: with update_fraction 1, weights equal the plain optimizer's bit for bit
- none: with update_fraction 0, no weight moves
- half: with 0.5, each mask has the exact count
- bits: what the masks leave out is bit-identical after each step
- resume: a new wrapper that loads the checkpoint continues bit for bit
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "speed"))

import measure
import torch
from torch import Tensor, nn

from rgp_optim import RGPSelectiveOptimizer

PACKAGES = {  # distribution: module with optimizers
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "lion-pytorch": "lion_pytorch",
    "bitsandbytes": "bitsandbytes.optim",
    "torch-optimi": "optimi",
    "came-pytorch": "came_pytorch",
    "adabelief-pytorch": "adabelief_pytorch",
    "torchao": "torchao.optim",  # these two compile, which takes minutes
    "heavyball": "heavyball",
}
KINDS = {"torch": ["float32", "channels_last"], "bitsandbytes": ["float32", "channels_last"]}
KINDS["adabelief-pytorch"] = ["float32", "half"]  # of the weights
COLUMNS = ["all", "none", "half", "bits", "resume"]
FIELDS = ["package", "version", "optimizer", "weights", *COLUMNS, "torch", "commit"]
KEY = ("package", "optimizer", "weights")
RESULT = Path(__file__).with_suffix(".csv")
REQUIRED = {"lr": 1e-3, "num_iterations": 10, "num_data": 10, "base_optimizer": torch.optim.SGD}
SECOND_ORDER = {"AdaHessian", "SophiaH"}
WITH_CLOSURE = {"AliG", "Momo", "MomoAdam"}  # and those whose step has no default for it
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def optimizers(module: str) -> dict[type, str]:
    """The optimizer classes of a module, each with the first of its names."""
    base, found = torch.optim.Optimizer, {}
    for name, cls in sorted(vars(importlib.import_module(module)).items()):
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base:
            if not name.startswith("_"):
                found.setdefault(cls, name)
    return found


def maker(cls: type) -> Make:
    """The optimizer with its defaults, and values for options that have none."""
    known = inspect.signature(cls).parameters
    empty = (inspect.Parameter.empty, None)
    options = {n: v for n, v in REQUIRED.items() if n in known and known[n].default in empty}

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            opt = cls(params, **options)
        except NotImplementedError:  # of bitsandbytes
            opt = cls(params, momentum=0.9, **options)
        except RuntimeError:  # a use_muon in each group
            opt = cls([{"params": params, "use_muon": True}], **options)
        except (AttributeError, ValueError):  # around another one
            if "optimizer" not in known:
                raise
            opt = cls(torch.optim.SGD(params, lr=0.01, momentum=0.9), **options)
        if callable(getattr(opt, "train", None)):
            opt.train()  # schedule-free
        return opt

    return make


def weights(kind: str) -> list[nn.Parameter]:
    """Two matrices; channels_last: a convolution; half: bfloat16."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (16, 8)] if kind == "channels_last" else [(16, 12), (8, 16)]
    drawn = [torch.randn(shape, generator=draw) for shape in shapes]
    if kind == "channels_last":
        drawn[0] = drawn[0].to(memory_format=torch.channels_last)
    if kind == "half":
        drawn = [each.bfloat16() for each in drawn]
    return [nn.Parameter(each) for each in drawn]


def loss_of(params: list[nn.Parameter], draw: torch.Generator) -> Tensor:
    """The squared distance to targets that are drawn."""
    targets = [torch.randn(p.shape, generator=draw) for p in params]
    return sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))


def step(opt: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    """One step; optimizers that draw numbers draw the same ones."""
    torch.manual_seed(seed)
    inner = opt.inner if isinstance(opt, RGPSelectiveOptimizer) else opt
    name, option = type(inner).__name__, inspect.signature(inner.step).parameters.get("closure")

    @torch.enable_grad()
    def closure() -> Tensor:
        draw = torch.Generator().manual_seed(100 + seed)
        nat, adv = loss_of(params, draw), loss_of(params, draw)
        loss = nat + 0.5 * adv
        if isinstance(opt, RGPSelectiveOptimizer):
            loss = opt.scored(loss, natural=nat, adversarial=adv)
        opt.zero_grad()
        loss.backward(create_graph=name in SECOND_ORDER)
        return loss

    if name in WITH_CLOSURE or (option is not None and option.default is option.empty):
        opt.step(closure)
    else:
        closure()
        opt.step()


class Trained:
    """An optimizer with its weights: wrapped, or plain where ``fraction`` is None."""

    def __init__(self, make: Make, kind: str, fraction: float | None, steps: int = 0) -> None:
        self.params = weights(kind)
        torch.manual_seed(0)
        self.opt: Any = make(self.params)
        if fraction is not None:
            self.opt = RGPSelectiveOptimizer(self.opt, update_fraction=fraction)
        self.train(range(steps))

    def train(self, seeds: range) -> Trained:
        for seed in seeds:
            step(self.opt, self.params, seed)
        return self

    def same(self, others: list[nn.Parameter]) -> bool:
        return all(torch.equal(p, q) for p, q in zip(self.params, others, strict=True))


def check_all(make: Make, kind: str) -> str:
    wrapped, plain = (Trained(make, kind, fraction, 12) for fraction in (1.0, None))  # some warm up
    if plain.same(weights(kind)):
        return "no: the plain optimizer moved nothing"
    return "yes" if plain.same(wrapped.params) else "no: weights differ"


def check_none(make: Make, kind: str) -> str:
    return "yes" if Trained(make, kind, 0.0, 3).same(weights(kind)) else "no: weights moved"


def steps(make: Make, kind: str) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Each weight after some steps, as it was before, and its mask."""
    one = Trained(make, kind, 0.5)
    for seed in range(4):
        before = [p.detach().clone() for p in one.params]
        one.train(range(seed, seed + 1))
        masks = (one.opt.masks()[p] for p in one.params)
        yield [*zip((p.detach() for p in one.params), before, masks, strict=True)]


def check_half(make: Make, kind: str) -> str:
    for found in steps(make, kind):
        counts = [int(mask.sum()) for _, _, mask in found]
        if counts != [mask.numel() // 2 for _, _, mask in found]:
            return f"no: counts {counts}"
    return "yes"


def check_bits(make: Make, kind: str) -> str:
    for found in steps(make, kind):
        for now, before, mask in found:
            if moved := int((now != before)[~mask].sum()):
                return f"no: {moved} conserved weights moved"
    return "yes"


def check_resume(make: Make, kind: str) -> str:
    if resumes(make, kind, 0.5):
        return "yes"
    return "no: weights differ" + ", as in the plain optimizer" * (not resumes(make, kind, None))


def resumes(make: Make, kind: str, fraction: float | None) -> bool:
    """Whether a new optimizer that loads the checkpoint continues bit for bit."""
    first, restored = Trained(make, kind, fraction, 3), Trained(make, kind, fraction)
    with torch.no_grad():
        for p, q in zip(restored.params, first.params, strict=True):
            p.copy_(q)
    restored.opt.load_state_dict(copy.deepcopy(first.opt.state_dict()))
    return first.train(range(3, 6)).same(restored.train(range(3, 6)).params)


CHECKS = check_all, check_none, check_half, check_bits, check_resume


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def row(make: Make, kind: str) -> dict[str, str]:
    """The answers of one optimizer."""
    stage = "not made"
    try:
        opt = Trained(make, kind, None).opt
        stage = "refused"
        RGPSelectiveOptimizer(opt)
        stage = "plain fails"
        Trained(make, kind, None, 1)
    except Exception as error:
        return dict.fromkeys(COLUMNS, f"{stage}: {one_line(error)}")
    answers = {}
    for column, check in zip(COLUMNS, CHECKS, strict=True):
        try:
            answers[column] = check(make, kind)
        except Exception as error:
            answers[column] = f"no: {one_line(error)}"
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="replace rows of a package or optimizer")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, str]] = []
    head = {"torch": torch.__version__, "commit": measure.git("rev-parse", "--short", "HEAD")}
    for package, module in PACKAGES.items():
        try:
            found = optimizers(module)
        except Exception as error:
            print(f"{package}: left out ({one_line(error)})")
            continue
        version = importlib.metadata.version(package)
        for cls, name in found.items():
            if only not in (None, package, name):
                continue
            for kind in KINDS.get(package, ["float32"]):
                about = {"package": package, "version": version, "optimizer": name, "weights": kind}
                rows.append({**about, **row(maker(cls), kind), **head})
                write(rows)
                if only or not all(rows[-1][c] == "yes" for c in COLUMNS):
                    print(package, name, kind, {c: rows[-1][c] for c in COLUMNS}, flush=True)
    for column in COLUMNS:
        print(column, dict(Counter(each[column].split(":")[0] for each in rows)))


def write(rows: list[dict[str, str]]) -> None:
    """Replace the rows of the same optimizers; others stay."""
    kept = {}
    if RESULT.exists():
        with RESULT.open(newline="", encoding="utf-8") as file:
            kept = {tuple(each[k] for k in KEY): each for each in csv.DictReader(file)}
    kept |= {tuple(each[k] for k in KEY): each for each in rows}
    with RESULT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


if __name__ == "__main__":
    main()
