"""One trainer for every method: data, schedule, start, checkpoints, history; one JSON for a run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import evaluation
import torch
import torch.nn.functional as F
from methods import METHODS, Method, Setting
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from image_data import Data, DataError, Images, load_cifar10, load_digits
from networks import NETWORKS
from report import versions, write_json, write_whole
from updates import Updates

from rgp_optim import RGPSelectiveOptimizer

LOADERS: dict[str, Callable[[str, bool], Data]] = {
    "digits": lambda folder, download: load_digits(),
    "cifar10": load_cifar10,
}
NORMALISE = {
    "digits": ([0.305], [0.376]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}


@dataclass(frozen=True)
class Preset:
    """What all methods of a table share.

    Attributes:
        data: A key of `LOADERS`.
        network: A key of the examples' ``NETWORKS``.
        epochs: Of the method.
        warmup_epochs: Of the natural training that warm methods start from.
        batch_size, lr, momentum, weight_decay: Of SGD, in both phases.
        schedule: "cosine", or "steps": a tenth at 50 % and 75 %.
        eps, attack_steps, step_size: Of the training attack; None: eps / 4.
        train_size, val_size, test_size, image_size: Images used, and their side; None: all.
        auto_attack: Images that AutoAttack gets, 0 for none.
        whole_auto_attack: All four of its attacks, or the first two.
        masking: Images for the tests of masked gradients; None: all.
        surrogate: Whether one of them attacks through AT's network, which is trained first then.
        bf16: Train under bfloat16 autocast.
        channels_last: Keep images and convolutions in that order.
        attack: How attacks on the divergence run, one of `captured.WAYS`; on a CPU without a graph.
        options: Settings of methods that are not their paper's, by name; "*" for all that have it.
    """

    data: str
    network: str
    epochs: int
    warmup_epochs: int
    batch_size: int
    lr: float
    eps: float
    attack_steps: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    step_size: float | None = None
    train_size: int | None = None
    val_size: int = 200
    test_size: int | None = None
    image_size: int | None = None
    auto_attack: int = 0
    whole_auto_attack: bool = False
    masking: int | None = None
    surrogate: bool = True
    bf16: bool = False
    channels_last: bool = False
    attack: str = "eager"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


PRESETS = {
    "digits": Preset(
        data="digits",
        network="resnet8",
        epochs=20,
        warmup_epochs=8,
        batch_size=32,
        lr=0.05,
        eps=0.15,
        attack_steps=7,
        auto_attack=200,
        options={"*": {"beta": 6.0}, "mart": {"beta": 5.0}},
    ),
    "cpu": Preset(
        data="cifar10",
        network="resnet8",
        epochs=12,
        warmup_epochs=8,
        batch_size=128,
        lr=0.1,
        eps=8 / 255,
        attack_steps=5,
        train_size=5000,
        val_size=250,
        test_size=1000,
        image_size=16,
        auto_attack=200,
        options={"*": {"beta": 5.0}},
    ),
    "gpu-short": Preset(
        data="cifar10",
        network="resnet18",
        epochs=30,
        warmup_epochs=10,
        batch_size=128,
        lr=0.1,
        eps=8 / 255,
        attack_steps=10,
        val_size=1000,
        auto_attack=1000,
        whole_auto_attack=True,
        masking=1000,
        surrogate=False,
        bf16=True,
        channels_last=True,
        attack="compile-graph",
        options={"*": {"beta": 5.0}},
    ),
    "paper": Preset(
        data="cifar10",
        network="resnet18",
        epochs=200,
        warmup_epochs=20,
        batch_size=128,
        lr=0.1,
        eps=8 / 255,
        attack_steps=10,
        schedule="steps",
        val_size=1000,
        auto_attack=10000,
        whole_auto_attack=True,
        channels_last=True,
        attack="compile-graph",
    ),
    "test": Preset(
        data="digits",
        network="resnet8",
        epochs=1,
        warmup_epochs=1,
        batch_size=64,
        lr=0.05,
        eps=0.1,
        attack_steps=2,
        train_size=128,
        val_size=32,
        test_size=32,
        options={"*": {"horizon": 1.0, "rate": 1.0}},
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a run reads and writes.

    Attributes:
        runs: Checkpoints and weights; not for the repository.
        results: One JSON for each finished run.
        data: Where CIFAR-10 is, or, with ``download``, goes.
        label: Name of the data beside results, if the files are not the originals.
        device: Where it trains.
    """

    runs: Path
    results: Path
    data: str = "data"
    label: str | None = None
    device: str = "cpu"
    download: bool = False


def options_of(preset: Preset, name: str) -> dict[str, Any]:
    """Return the settings of a method in a preset that are not its own."""
    kind = METHODS[name]
    common = {k: v for k, v in preset.options.get("*", {}).items() if k in kind.official}
    return {**kind.networks.get(preset.network, {}), **common, **preset.options.get(name, {})}


def needs(name: str, preset: Preset) -> tuple[str, ...]:
    """Return the methods whose weights this one wants: a teacher, or another's gradients."""
    if name == "at" or not (preset.surrogate or METHODS[name].taught):
        return ()
    return ("at",)


class Trainer:
    """One run: a method, a seed, a preset."""

    def __init__(self, name: str, seed: int, preset: Preset, place: Place) -> None:
        self.name, self.seed, self.preset, self.place = name, seed, preset, place
        self.device = torch.device(place.device)
        self.stem = f"{name}-seed{seed}"
        data = LOADERS[preset.data](place.data, place.download)
        self.label = place.label or data.label
        self.train, self.val, self.test = self._split(data)
        self.classes = int(data.train.labels.max()) + 1
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.seconds = 0.0

    def _split(self, data: Data) -> list[Images]:
        p = self.preset
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(self.seed))
        rest = order[p.val_size :][: p.train_size]
        splits = [data.train[rest], data.train[order[: p.val_size]], data.test[: p.test_size]]
        if p.image_size:
            splits = [split.shrink(p.image_size) for split in splits]
        return [split.to(self.device) for split in splits]

    def network(self, seed: int | None = None) -> nn.Module:
        mean, std = NORMALISE[self.preset.data]
        torch.manual_seed(self.seed if seed is None else seed)
        model = NETWORKS[self.preset.network](
            channels=len(mean), classes=self.classes, mean=mean, std=std
        )
        return model.to(self.device, memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.preset.channels_last else torch.contiguous_format

    def batches_of(self, images: Images, generator: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches to train on, or, without a generator, to judge by."""
        size = 500 if generator is None else self.preset.batch_size
        for x, y in images.batches(size, generator):
            yield x.contiguous(memory_format=self.memory_format), y

    def sgd(self, params: Any) -> torch.optim.Optimizer:
        p = self.preset
        return torch.optim.SGD(params, lr=p.lr, momentum=p.momentum, weight_decay=p.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        schedulers = torch.optim.lr_scheduler
        if self.preset.schedule == "cosine":
            return schedulers.CosineAnnealingLR(optimizer, steps)
        return schedulers.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])

    def autocast(self, cache: bool = True) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.preset.bf16, cache_enabled=cache
        )

    @property
    def step_size(self) -> float:
        p = self.preset
        return p.eps / 4 if p.step_size is None else p.step_size

    @property
    def steps_an_epoch(self) -> int:
        return len(self.train) // self.preset.batch_size

    # The start that warm methods share.

    def warm_up(self, model: nn.Module) -> None:
        """Train naturally, or take what another run of the same seed has left."""
        file = self.place.runs / f"warmup-seed{self.seed}.pt"
        if not file.exists():
            generator = torch.Generator(self.device).manual_seed(self.seed)
            optimizer = self.sgd(model.parameters())
            scheduler = self.schedule(optimizer, self.steps_an_epoch * self.preset.warmup_epochs)
            for _ in range(self.preset.warmup_epochs):
                model.train()
                for x, y in self.batches_of(self.train, generator):
                    with self.autocast():
                        loss = F.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    scheduler.step()
            write_whole(file, lambda path: torch.save(model.state_dict(), path))
        model.load_state_dict(self.weights(file))

    def weights(self, file: Path) -> dict[str, torch.Tensor]:
        if not file.exists():
            raise DataError(
                f"{file} is missing: run the method that leaves it first, with `run.py "
                "--results` elsewhere if its result is committed: weights are not."
            )
        state: dict[str, torch.Tensor] = torch.load(
            file, map_location=self.device, weights_only=True
        )
        return state

    def other(self, name: str) -> nn.Module:
        """Return the network that another method of this seed has trained, in eval mode."""
        model = self.network()
        model.load_state_dict(self.weights(self.place.runs / f"{name}-seed{self.seed}-last.pt"))
        return model.eval().requires_grad_(False)

    # Training.

    def method(self, model: nn.Module, generator: torch.Generator) -> Method:
        p = self.preset
        setting = Setting(
            eps=p.eps,
            attack_steps=p.attack_steps,
            step_size=self.step_size,
            epochs=p.epochs,
            total_steps=self.steps_an_epoch * p.epochs,
            seed=self.seed,
            classes=self.classes,
            generator=generator,
            new_network=lambda: self.network(self.seed + 1000),
            new_optimizer=self.sgd,
            teacher=lambda: self.other("at"),
            attack=p.attack if self.device.type == "cuda" else "eager",
            autocast=self.autocast,
        )
        try:
            return METHODS[self.name](model, setting, **options_of(p, self.name))
        except ValueError as error:  # a run this short has no room for what the method wants
            raise DataError(f"{self.stem}, {setting.total_steps} steps: {error}") from error

    def run(self, report: Callable[[str], None] = print) -> dict[str, Any]:
        """Train, evaluate and write the run's JSON; go on where an earlier attempt stopped."""
        p, place = self.preset, self.place
        file = place.results / f"{self.stem}.json"
        if file.exists():
            done: dict[str, Any] = json.loads(file.read_text())
            return done
        if p.auto_attack and importlib.util.find_spec("pyautoattack") is None:
            raise DataError("AutoAttack needs `pip install pyautoattack`, or --auto-attack 0.")
        for folder in (place.runs, place.results):
            folder.mkdir(parents=True, exist_ok=True)
        if "compile" in p.attack:
            torch._dynamo.reset()  # code for other runs' networks counts against a limit
        model = self.network()
        if METHODS[self.name].warm:
            self.warm_up(model)
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        method = self.method(model, generator)
        scheduler = self.schedule(method.optimizer, self.steps_an_epoch * p.epochs)
        kept = {
            "model": model,
            "optimizer": method.optimizer,
            "scheduler": scheduler,
            **method.carried(),
        }
        checkpoint = place.runs / f"{self.stem}.pt"
        first = self.load(checkpoint, kept, generator) if checkpoint.exists() else 0
        wrapped = isinstance(method.optimizer, RGPSelectiveOptimizer)
        updates = Updates(method.optimizer) if wrapped else None  # type: ignore[arg-type]
        for epoch in range(first, p.epochs):
            began = time.perf_counter()
            method.begin_epoch(epoch)
            sums: dict[str, torch.Tensor] = {}
            for x, y in self.batches_of(self.train, generator):
                with self.autocast():
                    logged = method.step(x, y)
                scheduler.step()
                if updates is not None:
                    updates.record()
                for key, value in logged.items():
                    sums[key] = sums.get(key, torch.zeros((), device=self.device)) + value
            row: dict[str, Any] = {k: float(v) / self.steps_an_epoch for k, v in sums.items()}
            attack = {"eps": p.eps, "steps": p.attack_steps, "step_size": self.step_size}
            with self.autocast():
                row["natural"] = evaluation.accuracy(model, self.batches(self.val))
                row["robust"] = evaluation.accuracy(model, self.batches(self.val), **attack)
            if updates is not None:
                row["updated"] = updates.mean()
            row["seconds"] = time.perf_counter() - began
            self.seconds += row["seconds"]
            self.history.append(row)
            if self.best is None or row["robust"] > self.best["robust"]:
                copied = {key: value.clone() for key, value in model.state_dict().items()}
                self.best = {"robust": row["robust"], "epoch": epoch + 1, "model": copied}
            self.save(checkpoint, kept, generator, epoch + 1)
            report(
                f"{self.stem} epoch {epoch + 1}/{p.epochs}: loss {row['loss']:.3f}, natural "
                f"{row['natural']:.1f} %, robust {row['robust']:.1f} %, {row['seconds']:.1f} s"
            )
        content = self.judge(model, method)
        write_json(file, content)
        checkpoint.unlink()  # the weights stay
        return content

    def batches(self, images: Images) -> Callable[[], Any]:
        return lambda: self.batches_of(images)

    def judge(self, model: nn.Module, method: Method) -> dict[str, Any]:
        """Evaluate the last and the best epoch on the test images."""
        p, place = self.preset, self.place
        assert self.best is not None
        began = time.perf_counter()
        test = self.batches(self.test)
        last = {key: value.clone() for key, value in model.state_dict().items()}
        results, weights = {}, {}
        for which, epoch, state in (
            ("last", p.epochs, last),
            ("best", self.best["epoch"], self.best["model"]),
        ):
            model.load_state_dict(state)
            file = place.runs / f"{self.stem}-{which}.pt"
            write_whole(file, lambda path, state=state: torch.save(state, path))
            results[which] = {"epoch": epoch, **evaluation.columns(model, test, p.eps)}
            weights[which] = {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            if p.auto_attack and which == "last":
                some = self.test[: p.auto_attack]
                results[which]["aa"] = evaluation.auto_attack(
                    model, some.floats(), some.labels, p.eps, whole=p.whole_auto_attack
                )
        model.load_state_dict(last)
        surrogate = self.other("at") if p.surrogate and self.name != "at" else None
        masking = evaluation.masking(model, self.batches(self.test[: p.masking]), p.eps, surrogate)
        attacks = "standard" if p.whole_auto_attack else "APGD-CE and APGD-T"
        return {
            "method": self.name,
            "title": method.title,
            "start": "natural warm-up" if method.warm else "random weights",
            "data": self.label + (f", {p.image_size} x {p.image_size}" if p.image_size else ""),
            "seed": self.seed,
            "preset": asdict(p),
            "options": json.loads(json.dumps(method.options)),
            "versions": versions(self.device),
            "images": {"train": len(self.train), "val": len(self.val), "test": len(self.test)},
            "auto_attack": f"{attacks} on {p.auto_attack} images" if p.auto_attack else None,
            "results": results,
            "weights": weights,
            "masking": {**masking, "suspicions": evaluation.is_masked(masking)},
            "seconds": {"training": self.seconds, "evaluation": time.perf_counter() - began},
            "history": self.history,
        }

    # Checkpoints.

    def save(self, file: Path, kept: dict[str, Any], generator: Any, epoch: int) -> None:
        state = {
            "kept": {name: thing.state_dict() for name, thing in kept.items()},
            "generator": generator.get_state(),
            "torch": torch.get_rng_state(),
            "epoch": epoch,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
        }
        write_whole(file, lambda path: torch.save(state, path))

    def load(self, file: Path, kept: dict[str, Any], generator: Any) -> int:
        state = torch.load(file, map_location=self.device, weights_only=True)
        for name, thing in kept.items():
            thing.load_state_dict(state["kept"][name])
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        self.history, self.best = state["history"], state["best"]
        self.seconds = state["seconds"]
        epoch: int = state["epoch"]
        return epoch
