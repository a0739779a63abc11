"""Train and evaluate CURE, TRADES, adversarial or standard training, on digits or CIFAR-10.

    python examples/cifar10_cure.py                                  # digits: about two minutes
    python examples/cifar10_cure.py --data cifar10 --download        # the published settings

All methods begin with the same natural warm-up, so runs that differ in ``--method`` alone can be
compared. Each leaves a table on the screen and, under ``--out``, results.json, curves.png, and
checkpoints from which ``--resume`` continues bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from image_data import DataError, Images, fingerprint, load_cifar10, load_digits
from networks import NETWORKS
from report import (
    load_checked,
    nrr,
    plot,
    save_checked,
    table,
    updated_text,
    versions,
    writable,
    write_json,
    write_whole,
)
from torch import nn
from tqdm import tqdm
from updates import Updates

from rgp_optim import (
    ConsistencyReviser,
    RGPSelectiveOptimizer,
    kl_adv_loss,
    kl_attack,
    pgd_attack,
    rgp_param_groups,
)

# What the data set decides, unless a flag does. CIFAR-10: the published settings (Gowda et al.,
# 2024, Table 9) with the weight decay of the authors' code; digits: something that two CPU cores
# can do.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cifar10": dict(
        network="resnet18",
        epochs=200,
        warmup_epochs=20,
        batch_size=128,
        lr=0.1,
        weight_decay=5e-4,
        schedule="steps",
        eps=8 / 255,
        attack_steps=10,
        beta=5.0,
        val_size=1000,
        normalise=([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ),
    "digits": dict(
        network="resnet8",
        epochs=20,
        warmup_epochs=8,
        batch_size=32,
        lr=0.05,
        weight_decay=5e-4,
        schedule="cosine",
        eps=0.15,
        attack_steps=7,
        beta=6.0,
        val_size=200,
        threads=1,  # as fast as two for so small a network, and the same sums on every machine
        normalise=([0.305], [0.376]),
    ),
}
# What one or two methods alone have, with its default.
CURE: dict[str, Any] = dict(
    update_fraction=0.7,
    alpha=0.1,
    scope="tensor",
    conserve="weights",
    gamma=1.0,
    rate=0.2,
    horizon=0.064,
    decay=None,
)
USED_BY = dict.fromkeys(CURE, ("cure",)) | {"beta": ("cure", "trades")}
# What may differ between a run and its continuation.
FREE = {"resume", "overwrite", "out", "warmup_file", "data_dir", "download", "device", "data_label"}
# What the natural warm-up depends on.
WARMUP = ["data", "network", "train_size", "val_size", "image_size", "warmup_epochs", "batch_size"]
WARMUP += ["lr", "momentum", "weight_decay", "schedule", "seed", "bf16", "channels_last"]
WARMUP += ["eps", "attack_steps", "attack_step_size"]  # for the robust accuracy in its history


# What flags may be, said before anything is read or trained.
COUNTS = ["epochs", "batch_size", "val_size", "attack_steps"]
COUNTS += ["train_size", "eval_size", "image_size", "threads"]
RULES: list[tuple[list[str], str, Callable[[float], bool]]] = [
    (COUNTS, "at least 1", lambda v: v >= 1),
    (["warmup_epochs"], "at least 0", lambda v: v >= 0),
    (["seed"], "at least 0 and below 2**31", lambda v: 0 <= v < 2**31),
    (["eps"], "above 0 and at most 1, as pixels are", lambda v: 0 < v <= 1),
    (["lr", "attack_step_size"], "finite and above 0", lambda v: math.isfinite(v) and v > 0),
    (
        ["momentum", "weight_decay", "beta", "gamma"],
        "finite and at least 0",
        lambda v: math.isfinite(v) and v >= 0,
    ),
    (["update_fraction", "alpha"], "in [0, 1]", lambda v: 0 <= v <= 1),
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="A default in (parentheses) is for CIFAR-10 / digits.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def by_data(name: str, kind: Any, text: str, **options: Any) -> None:
        key = name[2:].replace("-", "_")
        values = " / ".join(
            f"{DEFAULTS[d][key]:.4g}" if kind is float else str(DEFAULTS[d][key])
            for d in ("cifar10", "digits")
        )
        add(name, type=kind, help=f"{text} ({values})", **options)

    add("--method", choices=("cure", "trades", "at", "standard"), default="cure")
    add("--data", choices=("digits", "cifar10"), default="digits")
    add("--data-dir", default="data", help="where cifar-10-batches-py is, or goes (data)")
    add("--download", action="store_true", help="fetch CIFAR-10 if it is not there")
    add(
        "--data-label", help="name of the data beside results, when the files are not the originals"
    )
    add("--train-size", type=int, help="use that many training images only")
    by_data("--val-size", int, "training images held out to choose the best epoch")
    add("--eval-size", type=int, help="use that many test images only")
    add("--image-size", type=int, help="average images down to this size, for a CPU")
    by_data("--network", str, "network", choices=list(NETWORKS))
    by_data("--epochs", int, "epochs after the warm-up")
    by_data("--warmup-epochs", int, "epochs of natural training that all methods begin with")
    by_data("--batch-size", int, "images in a batch")
    by_data("--lr", float, "learning rate at the start of both phases")
    add("--momentum", type=float, default=0.9, help="of SGD (0.9)")
    by_data("--weight-decay", float, "weight decay; the paper has 5e-3, its code 5e-4")
    by_data(
        "--schedule",
        str,
        "learning rate: a tenth at 50 %% and 75 %% of a phase, or a cosine",
        choices=("steps", "cosine"),
    )
    by_data("--eps", float, "radius of the attacks, in pixels of [0, 1]")
    by_data("--attack-steps", int, "steps of the attack in training")
    add("--attack-step-size", type=float, help="their length (eps / 4)")
    by_data(
        "--beta",
        float,
        "cure, trades: weight of the KL term; the paper has 1, its code 5, TRADES 6",
    )
    add("--update-fraction", type=float, help="cure: share of weights updated (0.7)")
    add("--alpha", type=float, help="cure: natural share of the score (0.1)")
    add("--scope", choices=("tensor", "global"), help="cure: (tensor)")
    add(
        "--conserve",
        choices=("weights", "gradients", "update"),
        help="cure: (weights)",
    )
    add("--gamma", type=float, help="cure: weight of the consistency loss (1)")
    add("--rate", type=float, help="cure: probability of an update of the copy (0.2)")
    add(
        "--horizon",
        type=float,
        help="cure: averaging time as a fraction of the run (0.064, the published d = 0.999)",
    )
    add("--decay", type=float, help="cure: d itself, in place of --horizon")
    add("--seed", type=int, default=0, help="of everything that is drawn (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (the GPU if there is one)")
    add("--threads", type=int, help="of the CPU (torch's choice / 1)")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true", help="channels_last memory format")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--out", help="folder for what the run leaves (runs/DATA-METHOD-seedN)")
    add("--warmup-file", help="where the warm-up is kept (beside --out, by its settings)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", action="store_true", help="begin anew over the run in --out")
    args = parser.parse_args(argv)

    for name, methods in USED_BY.items():
        if getattr(args, name) is not None and args.method not in methods:
            parser.error(
                f"--{name.replace('_', '-')} is for --method {' or '.join(methods)}, not "
                f"{args.method}: leave it out."
            )
    if args.horizon is not None and args.decay is not None:
        parser.error("--horizon and --decay exclude each other.")
    for name, value in (DEFAULTS[args.data] | CURE).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.attack_step_size is None:
        args.attack_step_size = args.eps / 4
    if args.out is None:
        args.out = f"runs/{args.data}-{args.method}-seed{args.seed}"
    for names, rule, holds in RULES:
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                parser.error(f"--{name.replace('_', '-')} should be {rule}, not {value:g}.")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other.")
    if args.download and args.data != "cifar10":
        parser.error("--download is for --data cifar10; the digits come with scikit-learn.")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device).item()  # not on "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} cannot be used here: {reason}")
    places = {"--out": Path(args.out)}
    if args.warmup_file:
        places["--warmup-file"] = Path(args.warmup_file).parent
    for flag, folder in places.items():
        if problem := writable(folder):
            parser.error(f"{flag} cannot be written, {problem}.")
    return args


class Run:
    """One training run: the network, what changes while it trains, and its checkpoints."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = {k: v for k, v in vars(args).items() if k not in FREE | {"normalise"}}
        self.device = torch.device(args.device)
        self.out = Path(args.out)
        data = (
            load_digits() if args.data == "digits" else load_cifar10(args.data_dir, args.download)
        )
        self.data_label = args.data_label or data.label
        self.train, self.val, self.test = self._split(data.train, data.test)
        self.images = fingerprint(self.train, self.val, self.test)
        if args.image_size:
            self.data_label += f", {args.image_size} x {args.image_size} pixels"

        if args.threads:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        mean, std = args.normalise
        model = NETWORKS[args.network](channels=len(mean), mean=mean, std=std)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=layout)
        if args.method == "cure":
            self.make_reviser()  # what is wrong with its settings is said now
        self.net: nn.Module = self.model
        if args.compile:
            # Scores and loss share a graph: compiled backward passes may not free what they read.
            import torch._functorch.config as functorch

            functorch.donated_buffer = False
            torch.compiler.config.cache_key_tag = "kept graphs"  # or the cache knows no difference
            self.net = torch.compile(self.model)
        self.generator = torch.Generator(self.device)  # order, augmentation and attacks
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.seconds = 0.0

    def _split(self, train: Images, test: Images) -> tuple[Images, Images, Images]:
        """Hold out validation images, cut to the sizes asked for, move to the device."""
        args = self.args
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
        val, rest = order[: args.val_size], order[args.val_size :]
        splits = [train[rest[: args.train_size]], train[val], test[: args.eval_size]]
        if len(splits[0]) < args.batch_size:
            raise DataError(
                f"{len(splits[0])} training images are left, less than one batch of "
                f"{args.batch_size}: lower --batch-size or --val-size."
            )
        if args.image_size:
            splits = [split.shrink(args.image_size) for split in splits]
        first, second, third = (split.to(self.device) for split in splits)
        return first, second, third

    def make_reviser(self) -> ConsistencyReviser:
        args = self.args
        steps = len(self.train) // args.batch_size * args.epochs
        horizon = dict(horizon=args.horizon, total_steps=steps)
        how = horizon if args.decay is None else dict(decay=args.decay)
        try:
            return ConsistencyReviser(self.model, rate=args.rate, seed=args.seed, **how)
        except ValueError as error:
            raise DataError(f"--rate, --horizon, --decay: {error}") from error

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    # Training.

    def fit(self, phase: str, method: str, epochs: int, state: dict[str, Any] | None) -> None:
        """Train for ``epochs`` by ``method``, from ``state`` if there is a checkpoint."""
        args = self.args
        steps = len(self.train) // args.batch_size * epochs
        if method == "cure":
            groups = rgp_param_groups(self.model)
        else:
            groups = [{"params": list(self.model.parameters())}]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        reviser = updates = None
        if method == "cure":
            optimizer = RGPSelectiveOptimizer(
                optimizer,
                update_fraction=args.update_fraction,
                alpha=args.alpha,
                scope=args.scope,
                conserve=args.conserve,
            )
            updates = Updates(optimizer)
            reviser = self.make_reviser()
        scheduler: Any
        if args.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        else:
            scheduler = torch.optim.lr_scheduler.MultiStepLR(
                optimizer, [steps // 2, steps * 3 // 4]
            )
        # Seeded by phase, so that a warm-up from a file leads to the same run as one just made.
        self.generator.manual_seed(args.seed + (0 if phase == "warm-up" else 1))
        kept = {"optimizer": optimizer, "scheduler": scheduler}
        if reviser is not None:
            kept |= {"reviser": reviser, "updates": updates}
        done = 0
        if state is not None:
            for name, thing in kept.items():
                thing.load_state_dict(state[name])
            self.generator.set_state(state["generator"].cpu())
            done = state["epoch"]

        bar = tqdm(
            total=steps,
            initial=done * (steps // epochs),
            desc=phase if phase == "warm-up" else method,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        total = args.warmup_epochs + args.epochs  # counted through both phases, as in the table
        for epoch in range(done, epochs):
            began = time.perf_counter()
            lr = optimizer.param_groups[0]["lr"]
            row = self.train_epoch(method, optimizer, reviser, scheduler, updates, bar)
            if updates is not None:
                row["updated"], row["never_updated"] = updates.mean(), updates.never()
            if not math.isfinite(row["loss"]):
                raise DataError(
                    f"the loss is {row['loss']} in {phase} epoch {epoch + 1}: lower --lr (now "
                    f"{args.lr:g}) or --beta."
                )
            row["lr"] = lr
            row["natural"], row["robust"] = self.validate()
            row["seconds"] = time.perf_counter() - began
            self.seconds += row["seconds"]
            self.history.append({"phase": phase, **row})
            self.keep_best(phase)
            self.show(bar, row["loss"])
            bar.write(
                f"{phase:>8} epoch {len(self.history):>{len(str(total))}}/{total}: "
                f"loss {row['loss']:.3f}, "
                f"natural {row['natural']:.1f} %, robust {row['robust']:.1f} %, "
                f"{row['seconds']:.1f} s",
                file=sys.stdout,
            )
            sys.stdout.flush()
            states = {name: thing.state_dict() for name, thing in kept.items()}
            self.save(phase, epoch + 1, states)
        bar.close()

    def train_epoch(
        self,
        method: str,
        optimizer: Any,
        reviser: ConsistencyReviser | None,
        scheduler: Any,
        updates: Updates | None,
        bar: Any,
    ) -> dict[str, Any]:
        """Train for one epoch; return mean losses. Nothing in the loop waits for the device."""
        args, net = self.args, self.net
        attack = dict(
            eps=args.eps,
            step_size=args.attack_step_size,
            steps=args.attack_steps,
            generator=self.generator,
        )
        sums: dict[str, Any] = defaultdict(lambda: torch.zeros((), device=self.device))
        steps = 0
        net.train()
        for x, y in self.train.batches(args.batch_size, self.generator):
            if args.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            terms: dict[str, torch.Tensor] = {}
            optimizer.zero_grad()
            with self.autocast():
                # Separate forward passes: BatchNorm normalises natural and attacked images apart.
                if method == "standard":
                    logits = net(x)
                    terms["natural"] = loss = F.cross_entropy(logits, y)
                elif method == "at":
                    x_adv = pgd_attack(net, x, y, **attack)
                    logits = net(x_adv)
                    terms["adversarial"] = loss = F.cross_entropy(logits, y)
                else:
                    x_adv = kl_attack(net, x, **attack)
                    logits, logits_adv = net(x), net(x_adv)
                    terms["natural"] = F.cross_entropy(logits, y)
                    terms["adversarial"] = F.cross_entropy(logits_adv, y)
                    loss = kl_adv_loss(logits, logits_adv, y, beta=args.beta)
                    if method == "cure":
                        terms["consistency"] = reviser(x, x_adv, logits, logits_adv)
                        loss = loss + args.gamma * terms["consistency"]
            if method == "cure":
                natural, adversarial = terms["natural"], terms["adversarial"]
                loss = optimizer.scored(loss, natural=natural, adversarial=adversarial)
            loss.backward()
            optimizer.step()
            if reviser is not None and updates is not None:
                reviser.update()
                updates.record()
            scheduler.step()

            sums["loss"] += loss.detach()
            for name, term in terms.items():
                sums[f"loss_{name}"] += term.detach()
            steps += 1
            bar.update()
            if steps % 50 == 0 and not bar.disable:  # the one look at the device
                self.show(bar, sums["loss"].item() / steps)
        return {name: total.item() / steps for name, total in sums.items()}

    def show(self, bar: Any, loss: float) -> None:
        """Show the loss, and the accuracies of the last validation, beside the bar."""
        text = f"loss {loss:.3f}"
        if self.history:
            last = self.history[-1]
            text += f", natural {last['natural']:.1f} %, robust {last['robust']:.1f} %"
        bar.set_postfix_str(text)

    # Evaluation.

    def accuracy(self, images: Images, bar: Any = None, **attack: Any) -> float:
        """Return how many images are classified rightly, in percent, under an attack if any."""
        right = torch.zeros((), device=self.device)
        self.net.eval()
        for x, y in images.batches(500):
            if attack:
                x = pgd_attack(self.net, x, y, eps=self.args.eps, **attack)
            with torch.no_grad():
                right += (self.net(x).argmax(1) == y).sum()
            if bar is not None:
                bar.update(len(y))
        return 100 * right.item() / len(images)

    def validate(self) -> tuple[float, float]:
        """Return natural and robust accuracy on the validation images, in percent."""
        generator = torch.Generator(self.device).manual_seed(self.args.seed)
        attack = dict(step_size=self.args.attack_step_size, steps=self.args.attack_steps)
        with self.autocast():
            robust = self.accuracy(self.val, generator=generator, **attack)
            return self.accuracy(self.val), robust

    def evaluate(self, name: str) -> dict[str, float]:
        """Return the table's columns on the test images, in percent; in full precision."""
        # The usual 0.003 at 8/255, for other radii in proportion.
        pgd20 = dict(steps=20, step_size=0.003 * self.args.eps * 255 / 8)
        quiet = not sys.stderr.isatty()
        row = {"natural": self.accuracy(self.test)}
        with tqdm(
            desc=f"evaluating the {name} epoch",
            total=2 * len(self.test),
            unit="image",
            leave=False,
            disable=quiet,
            dynamic_ncols=True,
        ) as bar:
            for column, loss in (("pgd20", "cross_entropy"), ("cw", "margin")):
                generator = torch.Generator(self.device).manual_seed(self.args.seed)
                attack = dict(loss=loss, generator=generator, **pgd20)
                row[column] = self.accuracy(self.test, bar, **attack)
        row["nrr"] = nrr(row["natural"], row["cw"])
        return row

    def keep_best(self, phase: str) -> None:
        """Remember the weights of the epoch with the highest robust accuracy after the warm-up."""
        row = self.history[-1]
        if phase != "warm-up" and (self.best is None or row["robust"] > self.best["robust"]):
            weights = {name: t.clone() for name, t in self.model.state_dict().items()}
            self.best = {"robust": row["robust"], "epoch": len(self.history), "model": weights}

    # Files.

    def save(self, phase: str, epoch: int, states: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "settings": self.settings,
            "images": self.images,
            "phase": phase,
            "epoch": epoch,
            "model": self.model.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            **states,
        }
        save_checked(self.out / "checkpoint.pt", state)

    def load(self) -> dict[str, Any] | None:
        """Return the checkpoint to go on from, its weights and history already in place."""
        path = self.out / "checkpoint.pt"
        results = self.out / "results.json"
        if not self.args.resume:
            if not self.args.overwrite and (path.exists() or results.exists()):
                kind, more = "an unfinished", "--resume to go on with it, "
                if results.exists():
                    kind, more = "a finished", ""
                raise DataError(
                    f"{self.out} holds {kind} run: add {more}--overwrite to begin anew, "
                    "or give another --out."
                )
            for old in (path, results):  # neither belongs to the new run
                old.unlink(missing_ok=True)
            return None
        if not path.exists():
            raise DataError(f"There is nothing to resume in {self.out}: leave out --resume.")
        state = self.read(path, "begin anew with --overwrite")
        changed = [
            f"--{name.replace('_', '-')} was {state['settings'].get(name)!r}, is {value!r}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if changed:
            why = ""
            if "--epochs" in str(changed):
                why = " Learning rates and averaging depend on --epochs: a run cannot be extended."
            raise DataError(f"{path} was made with other settings: {'; '.join(changed)}.{why}")
        if state.get("images") != self.images:
            raise DataError(
                f"{path} was made with other images: give the data it had, or begin anew."
            )
        self.model.load_state_dict(state["model"])
        self.history, self.best = state["history"], state["best"]
        self.seconds = state["seconds"]
        return state

    def warm_up(self, state: dict[str, Any] | None) -> None:
        """Train naturally, or take over what a run with the same settings has left."""
        args = self.args
        if state is None and args.warmup_epochs == 0:
            return
        key = {name: getattr(args, name) for name in WARMUP}
        key["images"] = fingerprint(self.train, self.val)  # files of one name may differ
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        path = Path(args.warmup_file or self.out.parent / f"warmup-{args.data}-{digest}.pt")
        if state is None and path.exists():
            saved = self.read(path, "delete it, or give another --warmup-file")
            if saved["settings"] != key:
                raise DataError(
                    f"{path} is a warm-up with other settings or images: give another "
                    "--warmup-file."
                )
            print(f"warm-up: {args.warmup_epochs} epochs taken from {path}")
            self.model.load_state_dict(saved["model"])
            self.history, self.seconds = saved["history"], saved["seconds"]
            return
        self.fit("warm-up", "standard", args.warmup_epochs, state)
        content = {
            "settings": key,
            "model": self.model.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }
        save_checked(path, content)

    def read(self, path: Path, way_out: str) -> dict[str, Any]:
        """Return the content of a checkpoint or a warm-up."""
        try:
            return load_checked(path, self.device)
        except (ValueError, KeyError, RuntimeError) as error:
            raise DataError(f"{error}: {way_out}.") from error


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        run = Run(args)
        train(run)
        report(run)
    except DataError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, say; files are whole or not there
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(
            f"error: {place}{error.strerror}. Free space or give another --out, then --resume."
        )
    except KeyboardInterrupt:
        if (Path(args.out) / "checkpoint.pt").exists():
            instead = " in place of --overwrite" if args.overwrite else ""
            sys.exit(f"\nstopped; the same command with --resume{instead} goes on from {args.out}")
        sys.exit("\nstopped before the first checkpoint; the same command begins anew")


def train(run: Run) -> None:
    """Run both phases, from the start or from a checkpoint."""
    args = run.args
    run.out.mkdir(parents=True, exist_ok=True)
    state = run.load()
    beta = f"beta {args.beta:g}, " if args.method in USED_BY["beta"] else ""
    print(
        f"{args.method} on {run.data_label}: {len(run.train)} training, {len(run.val)} validation, "
        f"{len(run.test)} test images; {args.network}, eps {args.eps:.4g}, {beta}"
        f"seed {args.seed}, {run.device}\n"
        "natural, robust: accuracy on the validation images, as they are and under "
        f"PGD-{args.attack_steps}; epochs are counted from the first of the warm-up"
    )
    if state is None or state["phase"] == "warm-up":
        run.warm_up(state)
        state = None
    run.fit("training", args.method, args.epochs, state)


def report(run: Run) -> None:
    """Evaluate the last and the best epoch; print the table, write results, picture and weights."""
    args = run.args
    began = time.perf_counter()
    results = {"last": {"epoch": len(run.history), **run.evaluate("last")}}
    assert run.best is not None
    last = {name: t.clone() for name, t in run.model.state_dict().items()}
    run.model.load_state_dict(run.best["model"])
    results = {"best": {"epoch": run.best["epoch"], **run.evaluate("best")}, **results}
    write_whole(run.out / "best.pt", lambda path: torch.save(run.model.state_dict(), path))
    write_whole(run.out / "last.pt", lambda path: torch.save(last, path))
    eps = f"{args.eps * 255:g}/255" if args.data == "cifar10" else f"{args.eps:g}"
    content = {
        "data": run.data_label,
        "settings": run.settings,
        "versions": versions(run.device),
        "eps_text": eps,
        "test_images": len(run.test),
        "results": results,
        "seconds": {"training": run.seconds, "evaluation": time.perf_counter() - began},
        "history": run.history,
    }
    plot(run.out / "curves.png", content)
    write_json(run.out / "results.json", content)
    print(
        f"\n{args.method} on {run.data_label}, accuracy in % on {len(run.test)} test images;\n"
        f"PGD-20 and C&W (margin PGD-20) at eps {eps}"
    )
    print(table(results))
    if "updated" in run.history[-1]:
        print(updated_text(run.history[-1]))
    print(
        "best: the epoch most robust on validation images; "
        "NRR = 2 Nat Rob / (Nat + Rob), Rob = C&W\n"
        f"{run.seconds:.0f} s of training; results.json, curves.png and weights are in {run.out}"
    )


if __name__ == "__main__":
    main()
