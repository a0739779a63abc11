"""Train CURE on digits or CIFAR-10 and evaluate it, alone or with TRADES.

    python examples/cifar10_cure.py                        # digits: about two minutes
    python examples/cifar10_cure.py --compare              # adds TRADES from the same start
    python examples/cifar10_cure.py --data cifar10 --download        # the published settings

Natural training comes first, as in the paper; its weights are saved beside ``--out`` for other
runs. The script prints a table and writes results.json, curves.png, weights and checkpoints to
``--out``; ``--resume`` continues an interrupted run bit for bit. harness/ has the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from harness.image_data import DataError
from harness.networks import NETWORKS
from harness.report import plot, table, updated_text, versions, writable, write_json
from harness.training import (
    BY_NETWORK,
    CIFAR10,
    DIGITS,
    LOADERS,
    FlagError,
    Phase,
    Settings,
    Setup,
    claim,
)
from torch import nn
from tqdm import tqdm

from rgp_optim import (
    ConsistencyReviser,
    RGPSelectiveOptimizer,
    kl_adv_loss,
    kl_attack,
    rgp_param_groups,
)

PHASES = ("pre-training", "cure", "trades")
CURE = dict(update_fraction=0.7, alpha=0.1, scope="tensor", conserve="weights")
CURE |= dict(gamma=1.0, rate=0.2, horizon=0.064)
DEFAULTS: dict[str, dict[str, Any]] = {
    # One thread is as fast as two for so small a network, and gives the same sums on any machine.
    "digits": asdict(Settings(**DIGITS)) | CURE | dict(beta=2.0, threads=1),
    "cifar10": asdict(Settings(**CIFAR10)) | CURE | dict(beta=5.0, threads=None),
}


def train(setup: Setup, args: argparse.Namespace, method: str, model: nn.Module) -> Phase:
    """Train by "cure" or "trades": the loop of the README."""
    cure = method == "cure"
    opt: Any = setup.sgd(rgp_param_groups(model) if cure else model.parameters())
    if cure:
        reviser = make_reviser(setup, args, model)
        opt = RGPSelectiveOptimizer(
            opt,
            update_fraction=args.update_fraction,
            alpha=args.alpha,
            scope=args.scope,
            conserve=args.conserve,
            reviser=reviser,
        )
    settings = {name: getattr(args, name) for name in ["beta", *(CURE if cure else [])]}
    file = Path(args.out) / f"{method}.pt"
    phase = Phase(setup, method, model, opt, args.epochs, file, settings=settings)
    quiet, steps = not sys.stderr.isatty(), setup.steps_an_epoch
    attack = dict(eps=args.eps, step_size=setup.step_size, steps=args.attack_steps)
    for _ in phase.epochs():
        for x, y in tqdm(phase.batches(), method, steps, leave=False, disable=quiet):
            with setup.autocast():
                x_adv = kl_attack(model, x, generator=phase.generator, **attack)
                # Two forward passes: BatchNorm normalises natural and attacked images apart.
                logits, logits_adv = model(x), model(x_adv)
                loss = kl_adv_loss(logits, logits_adv, y, beta=args.beta)
                if cure:
                    loss = loss + args.gamma * reviser(x, x_adv, logits, logits_adv)
                natural, adversarial = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
            if cure:
                loss = opt.scored(loss, natural=natural, adversarial=adversarial)
            opt.zero_grad()
            loss.backward()
            opt.step()
            phase.scheduler.step()
            phase.log(loss=loss, loss_natural=natural, loss_adversarial=adversarial)
    return phase


def make_reviser(setup: Setup, args: argparse.Namespace, model: nn.Module) -> ConsistencyReviser:
    steps = setup.steps_an_epoch * args.epochs
    how = dict(rate=args.rate, horizon=args.horizon, total_steps=steps, seed=args.seed)
    try:
        return ConsistencyReviser(model, **how)
    except ValueError as error:
        raise FlagError(f"--rate, --horizon: {error}") from error


def adds_trades(args: argparse.Namespace) -> bool:
    """Whether ``--compare`` finds a finished run of CURE alone, which it keeps."""
    out = Path(args.out)
    results = out / "results.json"
    if args.overwrite or not (args.compare and results.exists() and (out / "cure.pt").exists()):
        return False
    found = json.loads(results.read_text())
    if "trades" in found["results"]:
        return False
    was = found["settings"] | {"seed": found["seed"]}
    changed = [
        f"{k} was {v}, is {getattr(args, k, None)}" for k, v in was.items() if getattr(args, k) != v
    ]
    if changed:
        raise FlagError(
            f"{out} holds a finished run with other settings ({', '.join(changed)}): repeat its "
            "settings to add TRADES, add --overwrite to start over, or give another --out."
        )
    return True


def prepare(args: argparse.Namespace) -> Setup:
    """Load the data, check the settings, make room for the run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    data = LOADERS[args.data](args.data_dir, args.download)
    setup = Setup(settings, args.seed, args.device, data)
    make_reviser(setup, args, setup.network())  # refuses wrong settings before training
    claim(Path(args.out), PHASES, args.resume or adds_trades(args), args.overwrite)
    return setup


def pretrained_file(setup: Setup, args: argparse.Namespace) -> Path:
    """Return where runs with the same pre-training share it: beside ``--out``."""
    digest = hashlib.sha256(json.dumps(setup.pretrain_key).encode()).hexdigest()[:12]
    return Path(args.out).parent / f"pretrained-{args.data}-{digest}.pt"


def run(setup: Setup, args: argparse.Namespace) -> None:
    """Pre-train, train, evaluate; print the table, write results and picture."""
    out = Path(args.out)
    eps = f"{args.eps * 255:g}/255" if args.data == "cifar10" else f"{args.eps:g}"
    print(
        f"{setup.label}: {len(setup.train)} training, {len(setup.val)} validation, "
        f"{len(setup.test)} test images\n"
        f"{args.network}, eps {eps}, beta {args.beta:g}, seed {args.seed}, {setup.device}\n"
        f"natural, robust: accuracy on validation images, clean and under PGD-{args.attack_steps}\n"
        "never updated: share of the selected layers' weights, since pre-training"
    )
    start = setup.network()
    shared, own = pretrained_file(setup, args), out / "pre-training.pt"
    history = {"pre-training": setup.pretrain(start, shared, own)}
    results, seconds = {}, {}
    for method in ("cure", "trades")[: 1 + args.compare]:
        model = setup.network()
        model.load_state_dict(start.state_dict())
        phase = train(setup, args, method, model)
        history[method], seconds[method] = phase.history, phase.seconds
        results[method] = phase.judge(out / method)
        if phase.updates is not None:
            updated = updated_text(phase.history[-1]["updated"], phase.updates.never())
    content = {
        "data": setup.label,
        "settings": {name: getattr(args, name) for name in DEFAULTS[args.data]},
        "seed": args.seed,
        "versions": versions(setup.device),
        "test_images": len(setup.test),
        "results": results,
        "seconds": seconds,
        "history": history,
    }
    title = f"{setup.label}, {args.network}, $\\epsilon$ = {eps}, seed {args.seed}"
    plot(out / "curves.png", history, title)
    write_json(out / "results.json", content)
    print(f"\naccuracy in % on {len(setup.test)} test images; C&W is PGD-20 on the margin")
    print(table(results))
    print(f"CURE: {updated}")
    print(
        f"best: most robust on the {len(setup.val)} validation images, the first of equal epochs\n"
        "NRR = 2 Nat Rob / (Nat + Rob), Rob = C&W\n"
        f"results.json, curves.png and weights are in {out}"
    )


# Flags.


def number(kind: Any, rule: str, holds: Callable[[float], bool]) -> Callable[[str], Any]:
    """Return a parser of numbers that hold a rule."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"should be {rule}, not {value:g}.")
        return value

    parse.__name__ = kind.__name__  # in argparse's message
    return parse


COUNT = number(int, "at least 1", lambda v: v >= 1)
POSITIVE = number(float, "finite and above 0", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = number(float, "finite and at least 0", lambda v: 0 <= v < math.inf)
FRACTION = number(float, "in [0, 1]", lambda v: 0 <= v <= 1)
FLAGS: dict[str, tuple[Any, str]] = {  # those without a parser are one of these
    "network": (list(NETWORKS), "network; some bring settings of Table 9 of the paper"),
    "epochs": (COUNT, "epochs after pre-training"),
    "pretrain_epochs": (number(int, "at least 0", lambda v: v >= 0), "epochs of natural training"),
    "batch_size": (COUNT, "images in a batch"),
    "lr": (POSITIVE, "highest learning rate of both phases"),
    "momentum": (NOT_NEGATIVE, "SGD momentum"),
    "weight_decay": (NOT_NEGATIVE, "the paper has 5e-3, its code 5e-4"),
    "schedule": (["steps", "cosine"], "divide by ten at 50 %% and 75 %% of a phase, or cosine"),
    "lr_warmup": (FRACTION, "share of the steps in which the learning rate rises from 0"),
    "eps": (
        number(float, "above 0 and at most 1, as pixels are", lambda v: 0 < v <= 1),
        "radius of the attacks, in pixels of [0, 1]",
    ),
    "attack_steps": (COUNT, "steps of the attack in training"),
    "step_size": (POSITIVE, "attack step size; eps / 4 if not given"),
    "beta": (NOT_NEGATIVE, "weight of the KL term; the paper has 1, its code 5, TRADES 6"),
    "update_fraction": (FRACTION, "share of weights updated"),
    "alpha": (FRACTION, "natural share of the score"),
    "scope": (["tensor", "global"], "select in each tensor, or over all of them"),
    "conserve": (["weights", "gradients", "update"], "what a step conserves"),
    "gamma": (NOT_NEGATIVE, "weight of the consistency loss"),
    "rate": (FRACTION, "probability of an update of the averaged copy"),
    "horizon": (POSITIVE, "averaging time of the copy as a fraction of the run"),
    "train_size": (COUNT, "number of training images"),
    "val_size": (COUNT, "validation images, held out of the training images"),
    "test_size": (COUNT, "number of test images"),
    "threads": (COUNT, "CPU threads; torch's choice if not given"),
}


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one line; the usage is for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=list(DEFAULTS), default="digits")
    add("--data-dir", default="data", help="directory of cifar-10-batches-py (data)")
    add("--download", action="store_true", help="fetch CIFAR-10 if it is not there")
    add("--compare", action="store_true", help="add TRADES, also to a finished run")
    for name, (kind, text) in FLAGS.items():
        both = (DEFAULTS[data][name] for data in DEFAULTS)
        values = " / ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in both)
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        add(f"--{name.replace('_', '-')}", help=f"{text} ({values})", **how)
    seeds = number(int, "at least 0 and below 2**31", lambda v: 0 <= v < 2**31)
    add("--seed", type=seeds, default=0, help="random seed (0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1, ...")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true", help="channels_last memory format")
    add("--out", help="folder of the run (runs/DATA-seedN)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args(argv)
    for name, value in (DEFAULTS[args.data] | BY_NETWORK.get(args.network, {})).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{args.data}-seed{args.seed}"
    if args.download and args.data != "cifar10":
        parser.error("--download is for --data cifar10; the digits come with scikit-learn.")
    try:
        torch.empty(1, device=args.device).item()  # not on "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} cannot be used here: {reason}")
    if problem := writable(Path(args.out)):
        parser.error(f"--out cannot be written, {problem}.")
    return args


def way_on(setup: Setup | None, args: argparse.Namespace) -> str:
    """Say what an interrupted run has saved, and which command continues it."""
    if setup is None:
        resumes = " and resumes the download" if args.download else ""
        return f"Training had not begun; the same command starts again{resumes}."
    out, same = Path(args.out), "the same command"
    if any((out / f"{phase}.pt").exists() for phase in PHASES):
        if not args.resume and not (out / "results.json").exists():
            same += " with --resume" + (" in place of --overwrite" if args.overwrite else "")
        return f"Finished epochs are saved in {out}; {same} continues from there."
    if args.resume:  # pre-training, which is complete now, was all there was
        same += " without --resume"
    if (file := pretrained_file(setup, args)).exists():
        return f"The pre-trained weights are saved as {file}; {same} continues from it."
    return f"No epoch was finished, nothing is saved; {same} starts again."


def main(argv: list[str] | None = None) -> None:
    args, setup = parse(argv), None
    try:
        setup = prepare(args)
        run(setup, args)
        return
    except FlagError as error:
        code, said = 2, f"error: {error}"
    except DataError as error:
        code, said = 1, f"error: {error}"
    except OSError as error:  # a full disk, say; files are whole or not there
        place = f"{error.filename}: " if error.filename else ""
        said = f"error: {place}{error.strerror}. Free space or change permissions. "
        code, said = 1, said + way_on(setup, args)
    except KeyboardInterrupt:
        code, said = 130, f"\nstopped. {way_on(setup, args)}"
    print(said, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
