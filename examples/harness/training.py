"""Everything around a training loop: settings, data, schedule, validation, checkpoints.

A `Setup` holds what the phases of a run share, and a `Phase` is one of them:

    phase = Phase(setup, "cure", model, opt, epochs, Path("cure.pt"))
    for _ in phase.epochs():
        for x, y in phase.batches():
            ...
            opt.step()
            phase.scheduler.step()
            phase.log(loss=loss)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness.image_data import Data, DataError, Images, fingerprint, load_cifar10, load_digits
from harness.networks import NETWORKS
from harness.report import load_checked, nrr, save_checked, write_whole
from harness.updates import Updates
from torch import Tensor, nn

from rgp_optim import RGPSelectiveOptimizer, pgd_attack

LOADERS: dict[str, Callable[[str, bool], Data]] = {
    "digits": lambda folder, download: load_digits(),
    "cifar10": lambda folder, download: load_cifar10(folder, download),
}
NORMALISE = {
    "digits": ([0.305], [0.376]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}
# What natural pre-training depends on, besides the images; the attack for its history.
PRETRAIN = ["data", "network", "train_size", "val_size", "image_size", "augment", "batch_size"]
PRETRAIN += ["pretrain_epochs", "lr", "momentum", "weight_decay", "schedule", "bf16"]
PRETRAIN += ["channels_last", "seed", "eps", "attack_steps", "step_size"]

Batches = Callable[[], Any]  # yields images and labels
Report = Callable[[str], None]


def say(line: str) -> None:
    print(line, flush=True)


class FlagError(DataError):
    """Settings that cannot work; the message names the flags."""


@dataclass(frozen=True)
class Settings:
    """What all methods of a comparison share.

    Attributes:
        data: A key of `LOADERS`.
        network: A key of `NETWORKS`.
        epochs: Of the method.
        pretrain_epochs: Of the natural training that it starts from.
        batch_size, lr, momentum, weight_decay: Of SGD, in both phases.
        schedule: "cosine", or "steps": divided by ten at 50 % and 75 %.
        lr_warmup: Share of the method's steps over which the learning rate rises from 0: the full
            rate breaks the natural network that some methods start from.
        eps, attack_steps, step_size: Of the training attack; None: eps / 4.
        train_size, val_size, test_size, image_size: Images used, and their side; None: all.
        augment: Crop and flip training images, where the data set has it.
        bf16: Train under bfloat16 autocast.
        channels_last: Keep images and convolutions in that order.
    """

    data: str
    network: str
    epochs: int
    pretrain_epochs: int
    batch_size: int
    lr: float
    eps: float
    attack_steps: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    lr_warmup: float = 0.1
    step_size: float | None = None
    train_size: int | None = None
    val_size: int = 200
    test_size: int | None = None
    image_size: int | None = None
    augment: bool = True
    bf16: bool = False
    channels_last: bool = False


# Digits: something that two CPU cores can do. CIFAR-10: the published settings (Gowda et al., 2024,
# Table 9) with the weight decay of the authors' code.
DIGITS: dict[str, Any] = dict(
    data="digits",
    network="resnet8",
    epochs=20,
    pretrain_epochs=8,
    batch_size=32,
    lr=0.05,
    eps=0.15,
    attack_steps=7,
)
CIFAR10: dict[str, Any] = dict(
    data="cifar10",
    network="resnet18",
    epochs=200,
    pretrain_epochs=20,
    batch_size=128,
    lr=0.1,
    eps=8 / 255,
    attack_steps=10,
    schedule="steps",
    val_size=1000,
)
BY_NETWORK: dict[str, dict[str, float]] = {  # what Table 9 changes for CURE
    "wrn34-10": {"update_fraction": 0.5, "alpha": 0.3, "gamma": 0.5},
    "preactresnet18": {"update_fraction": 0.8, "alpha": 0.2},
}


class Setup:
    """Settings, seed and data of a run, and what is made from them."""

    def __init__(self, settings: Settings, seed: int, device: str, data: Data) -> None:
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        self.train, self.val, self.test = self._split(data)
        self.classes = int(data.train.labels.max()) + 1
        side = settings.image_size
        self.label = data.label + (f", {side} x {side}" if side else "")
        # What a checkpoint must agree in: settings of training, not of what a subclass adds.
        self.key = {f.name: getattr(settings, f.name) for f in fields(Settings)} | {"seed": seed}

    def _split(self, data: Data) -> list[Images]:
        """Hold out validation images, cut to the sizes asked for, move to the device."""
        s = self.settings
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(self.seed))
        rest = order[s.val_size :][: s.train_size]
        if len(rest) < s.batch_size:
            raise FlagError(
                f"{len(rest)} training images are left, less than one batch of {s.batch_size}: "
                "lower --batch-size or --val-size."
            )
        splits = [data.train[rest], data.train[order[: s.val_size]], data.test[: s.test_size]]
        splits[0] = replace(splits[0], crop=splits[0].crop * s.augment)
        if s.image_size:
            splits = [split.shrink(s.image_size) for split in splits]
        return [split.to(self.device) for split in splits]

    @property
    def steps_an_epoch(self) -> int:
        return len(self.train) // self.settings.batch_size

    @property
    def step_size(self) -> float:
        s = self.settings
        return s.eps / 4 if s.step_size is None else s.step_size

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.settings.channels_last else torch.contiguous_format

    def network(self, seed: int | None = None) -> nn.Module:
        mean, std = NORMALISE[self.settings.data]
        torch.manual_seed(self.seed if seed is None else seed)
        make = NETWORKS[self.settings.network]
        model = make(channels=len(mean), classes=self.classes, mean=mean, std=std)
        return model.to(self.device, memory_format=self.memory_format)

    def sgd(self, params: Any) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.SGD(params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> Any:
        """Return the scheduler: a cosine or two drops, times a linear rise at the beginning."""
        rise = round(warmup * steps)

        def factor(step: int) -> float:
            if self.settings.schedule == "cosine":
                shape = (1 + math.cos(math.pi * step / steps)) / 2
            else:
                shape = 0.1 ** ((step >= steps // 2) + (step >= steps * 3 // 4))
            return shape * (min(1.0, (step + 1) / rise) if rise else 1.0)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def autocast(self, cache: bool = True) -> torch.autocast:
        on = self.settings.bf16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on, cache_enabled=cache)

    def loader(
        self, images: Images, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for training, or, without a generator, for evaluation."""
        size = 500 if generator is None else self.settings.batch_size
        for x, y in images.batches(size, generator):
            yield x.contiguous(memory_format=self.memory_format), y

    @property
    def pretrain_key(self) -> dict[str, Any]:
        """What natural pre-training depends on; files of one name may hold other images."""
        key = {name: self.key[name] for name in PRETRAIN}
        return key | {"images": fingerprint(self.train, self.val)}

    def pretrain(
        self, model: nn.Module, file: Path, checkpoint: Path, report: Report | None = None
    ) -> list[dict[str, Any]]:
        """Train naturally, or load the weights of an earlier run; return the history.

        Args:
            model: Gets the weights.
            file: Keeps the result for other runs.
            checkpoint: Keeps finished epochs until then.
            report: As of a `Phase`.
        """
        epochs, report = self.settings.pretrain_epochs, report or say
        if epochs == 0:
            return []
        if file.exists():
            report(f"pre-training: weights reused from {file}")
        else:
            opt = self.sgd(model.parameters())
            phase = Phase(self, "pre-training", model, opt, epochs, checkpoint, report=report)
            for _ in phase.epochs():
                for x, y in phase.batches():
                    with self.autocast():
                        loss = F.cross_entropy(model(x), y)
                    opt.zero_grad()
                    loss.backward()
                    opt.step()
                    phase.scheduler.step()
                    phase.log(loss=loss)
            content = {
                "settings": self.pretrain_key,
                "model": model.state_dict(),
                "history": phase.history,
            }
            save_checked(file, content)
            checkpoint.unlink()
            report(f"pre-training: weights saved for other runs as {file}")
        saved = read(file, self.device)
        if saved["settings"] != self.pretrain_key:
            raise DataError(f"{file} was pre-trained with other settings or images: delete it.")
        model.load_state_dict(saved["model"])
        history: list[dict[str, Any]] = saved["history"]
        return history


class Phase:
    """The epochs of one method: history, best weights, and a checkpoint after each epoch.

    Args:
        setup: Of the run.
        name: Of the phase.
        model: Is trained.
        optimizer: Its learning rate is scheduled; where it selects, the share of updated weights
            is in the history.
        epochs: Number of epochs.
        checkpoint: A file. If it exists, training resumes from it, bit for bit.
        generator: Of the order, the augmentation and the attacks; None: a new one.
        settings: Must equal those of a checkpoint, besides the setup's.
        report: Gets a line for each epoch; None: it is printed.
        **kept: Other objects to save, with a ``state_dict``.
    """

    def __init__(
        self,
        setup: Setup,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        checkpoint: Path,
        *,
        generator: torch.Generator | None = None,
        settings: dict[str, Any] | None = None,
        report: Report | None = None,
        **kept: Any,
    ) -> None:
        self.setup, self.name, self.model, self.total = setup, name, model, epochs
        self.checkpoint = checkpoint
        self.report = report or say
        self.settings = setup.key | (settings or {})
        self.images = fingerprint(setup.train, setup.val, setup.test)
        warmup = 0.0 if name == "pre-training" else setup.settings.lr_warmup
        self.scheduler = setup.schedule(optimizer, setup.steps_an_epoch * epochs, warmup)
        self.updates = Updates(optimizer) if isinstance(optimizer, RGPSelectiveOptimizer) else None
        self.kept = {"model": model, "optimizer": optimizer, "scheduler": self.scheduler, **kept}
        if self.updates is not None:
            self.kept["updates"] = self.updates
        self.generator = generator or torch.Generator(setup.device)
        # By phase: weights pre-trained earlier lead to the same run as one just made.
        self.generator.manual_seed(setup.seed + (name != "pre-training"))
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"robust": -1.0}
        self.seconds = 0.0
        self._sums: dict[str, Tensor] = {}

    def epochs(self) -> Iterator[int]:
        """Yield each epoch that is left; after its steps validate and save."""
        done = self._load()
        if done:
            self.report(f"{self.name}: {done} of {self.total} epochs reused from {self.checkpoint}")
        for epoch in range(done, self.total):
            began = time.perf_counter()
            self._sums = {}
            yield epoch
            steps = self.setup.steps_an_epoch
            row: dict[str, Any] = {k: float(v) / steps for k, v in self._sums.items()}
            if not math.isfinite(row["loss"]):
                raise DataError(
                    f"the loss is {row['loss']} in epoch {epoch + 1} of {self.name}: lower --lr "
                    f"(now {self.setup.settings.lr:g}) or --beta."
                )
            row["natural"], row["robust"] = self._validate()
            if self.updates is not None:
                row["updated"] = self.updates.mean()
            row["seconds"] = time.perf_counter() - began
            self.seconds += row["seconds"]
            self.history.append(row)
            if row["robust"] > self.best["robust"]:
                weights = {name: t.clone() for name, t in self.model.state_dict().items()}
                self.best = {"robust": row["robust"], "epoch": epoch + 1, "model": weights}
            self._save(epoch + 1)
            unused = f", never updated {self.updates.never():.1%}" if self.updates else ""
            self.report(
                f"{self.name} {epoch + 1}/{self.total}: loss {row['loss']:.3f}, "
                f"natural {row['natural']:.1f}%, robust {row['robust']:.1f}%{unused}, "
                f"{row['seconds']:.0f} s"
            )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches, shuffled and augmented."""
        self.model.train()
        yield from self.setup.loader(self.setup.train, self.generator)

    def log(self, **terms: Tensor) -> None:
        """Add a step's losses to the epoch's means; nothing waits for the device."""
        for name, term in terms.items():
            zero = torch.zeros((), device=self.setup.device)
            self._sums[name] = self._sums.get(name, zero) + term.detach()
        if self.updates is not None:
            self.updates.record()

    def judge(self, stem: Path) -> dict[str, dict[str, Any]]:
        """Evaluate the best and the last epoch on the test images; keep weights as STEM-last.pt."""
        last = {name: t.clone() for name, t in self.model.state_dict().items()}
        results = {}
        for which, epoch, weights in (
            ("best", self.best["epoch"], self.best["model"]),
            ("last", self.total, last),
        ):
            self.model.load_state_dict(weights)
            file = stem.with_name(f"{stem.name}-{which}.pt")
            write_whole(file, lambda path, weights=weights: torch.save(weights, path))
            test = lambda: self.setup.loader(self.setup.test)  # noqa: E731
            found = columns(self.model, test, self.setup.settings.eps)
            results[which] = {"epoch": epoch, **found}
        return results

    def _validate(self) -> tuple[float, float]:
        """Return natural and robust accuracy on the validation images, in percent."""
        s, batches = self.setup.settings, lambda: self.setup.loader(self.setup.val)
        attack = {"eps": s.eps, "steps": s.attack_steps, "step_size": self.setup.step_size}
        with self.setup.autocast():
            return accuracy(self.model, batches), accuracy(self.model, batches, **attack)

    def _save(self, epoch: int) -> None:
        state = {
            "settings": self.settings,
            "images": self.images,
            "kept": {name: thing.state_dict() for name, thing in self.kept.items()},
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "epoch": epoch,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
        }
        save_checked(self.checkpoint, state)

    def _load(self) -> int:
        """Load the checkpoint if there is one; return the number of finished epochs."""
        if not self.checkpoint.exists():
            return 0
        state = read(self.checkpoint, self.setup.device)
        changed = [
            f"{name} was {state['settings'].get(name)!r}, is {value!r}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if changed:
            why = ""
            if any(each.startswith("epochs ") for each in changed):
                why = " Learning rates and averaging depend on epochs: a run cannot be extended."
            raise DataError(
                f"{self.checkpoint} was made with other settings: {'; '.join(changed)}.{why} "
                "Repeat its settings, or start over in another folder."
            )
        if state["images"] != self.images:
            raise DataError(
                f"{self.checkpoint} was made with other images: give the data it had, or begin "
                "anew."
            )
        for name, thing in self.kept.items():
            thing.load_state_dict(state["kept"][name])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        self.history, self.best = state["history"], state["best"]
        self.seconds = state["seconds"]
        epoch: int = state["epoch"]
        return epoch


def claim(out: Path, phases: Sequence[str], resume: bool, overwrite: bool) -> None:
    """Refuse to overwrite a run in ``out`` unless asked to; delete an old one."""
    results = out / "results.json"
    started = [file for phase in phases if (file := out / f"{phase}.pt").exists()]
    if resume:
        if not started:
            raise DataError(f"There is nothing to resume in {out}: leave out --resume.")
        return
    if not overwrite and (started or results.exists()):
        kind, more = "an unfinished", "--resume to continue it, "
        if results.exists():
            kind, more = "a finished", ""
        raise DataError(
            f"{out} holds {kind} run: add {more}--overwrite to start over, or give another --out."
        )
    for file in (results, *(file for phase in phases for file in out.glob(f"{phase}*.pt"))):
        file.unlink(missing_ok=True)


def read(file: Path, device: torch.device) -> dict[str, Any]:
    """Return the content of a checkpoint or of pre-trained weights."""
    try:
        return load_checked(file, device)
    except (ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{error}: delete it to start over.") from error


# Evaluation, in eval mode, on images in [0, 1]; accuracies in percent.


def accuracy(
    model: nn.Module,
    batches: Batches,
    *,
    attacked: nn.Module | None = None,
    seed: int = 0,
    **attack: Any,
) -> float:
    """Return the accuracy, under PGD if ``attack`` has its settings; in percent.

    Args:
        model: The network to evaluate.
        batches: Yields images and labels.
        attacked: The network whose gradients the attack follows; None is ``model``.
        seed: Of the attack's start.
        **attack: As in `rgp_optim.pgd_attack`.
    """
    model.eval()
    right: Tensor | int = 0  # stays on the device until the end
    count = 0
    generator = None
    for x, y in batches():
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(seed)
        if attack:
            source = model if attacked is None else attacked
            x = pgd_attack(source, x, y, generator=generator, **attack)
        with torch.no_grad():
            right += (model(x).argmax(1) == y).sum()
        count += len(y)
    return 100 * int(right) / count


def pgd20(eps: float) -> dict[str, Any]:
    """Return PGD-20: steps of 0.003 at the published radius of 8/255, in proportion elsewhere."""
    return {"eps": eps, "steps": 20, "step_size": 0.003 * eps / (8 / 255)}


def columns(model: nn.Module, batches: Batches, eps: float) -> dict[str, float]:
    """Return natural, PGD-20 and C&W accuracy, and NRR with C&W as its Rob."""
    row = {
        "natural": accuracy(model, batches),
        "pgd20": accuracy(model, batches, **pgd20(eps)),
        "cw": accuracy(model, batches, loss="margin", **pgd20(eps)),
    }
    return {**row, "nrr": nrr(row["natural"], row["cw"])}
