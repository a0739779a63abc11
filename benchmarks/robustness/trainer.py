"""One trainer for every method: presets, runs, one JSON file per run."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import evaluation
import torch
from harness.image_data import DataError
from harness.report import versions, write_json
from harness.training import CIFAR10, DIGITS, LOADERS, Phase, Report, Settings, Setup
from methods import METHODS, Method, Setting
from methods.cure import FRONT, RANKING, REVISION, SHUFFLED, START
from torch import nn


@dataclass(frozen=True)
class Preset(Settings):
    """Settings that all methods of a table share."""

    auto_attack: int = 0  # images that AutoAttack gets
    whole_auto_attack: bool = False  # all four of its attacks, or the first two
    masking: int | None = None  # images for the tests of masked gradients; None: all
    surrogate: bool = True  # one of them attacks through AT's network, which is trained first then
    attack: str = "eager"  # one of `captured.WAYS`; on a CPU always eager
    # Settings of methods that are not their paper's, by name; "*" for all that have it.
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


GPU = {"channels_last": True, "attack": "compile-graph", "whole_auto_attack": True}
PRESETS = {
    "digits": Preset(
        **DIGITS, channels_last=True, auto_attack=200, masking=200,
        options={"*": {"beta": 2.0}, "mart": {"beta": 5.0}},
    ),
    "cpu": Preset(
        data="cifar10", network="resnet8", epochs=12, pretrain_epochs=8, batch_size=128, lr=0.1,
        eps=8 / 255, attack_steps=5, train_size=5000, val_size=250, test_size=1000, image_size=16,
        channels_last=True, auto_attack=200, masking=200, options={"*": {"beta": 5.0}},
    ),
    "gpu-short": Preset(
        **CIFAR10 | GPU | {"epochs": 30, "pretrain_epochs": 10, "schedule": "cosine"},
        auto_attack=1000, masking=1000, surrogate=False, bf16=True, options={"*": {"beta": 5.0}},
    ),
    "paper": Preset(**CIFAR10 | GPU, auto_attack=10000, lr_warmup=0.0),
    "test": Preset(
        data="digits", network="resnet8", epochs=1, pretrain_epochs=1, batch_size=64, lr=0.05,
        eps=0.1, attack_steps=2, train_size=128, val_size=32, test_size=32,
        options={"*": {"horizon": 1.0, "rate": 1.0}},
    ),
}  # fmt: skip
PRESETS["digits-beta6"] = replace(
    PRESETS["digits"], options={"*": {"beta": 6.0}, "mart": {"beta": 5.0}}
)
OVERFITTING = ["at", "trades", "trades-pre", "cure", "cure-random"]
PARTS = ["at-pre", "trades-pre-revision", "cure-no-revision"]
DIGITS_FRONT = [name for name in FRONT if not name.endswith("3.5")]
# Rows other than the table's, without AutoAttack; and the presets that they are compared with.
EXPERIMENTS = {
    "ranking-digits": ("digits-beta6", ["none", *RANKING], ()),
    "ranking-digits-beta2": ("digits", ["none", *(n for n in RANKING if n[-1] in "73")], ()),
    "shuffled-digits": ("digits-beta6", list(SHUFFLED), ("ranking-digits",)),
    "ranking-cpu": ("cpu", ["none", *(n for n in RANKING if not n.endswith("0.5"))], ()),
    "revision-digits": ("digits", list(REVISION), ("digits",)),
    "start-digits": ("digits-beta6", list(START), ("digits-beta6",)),
    "front-digits": ("digits", DIGITS_FRONT, ("ranking-digits", "digits-beta6")),
    "front-cpu": ("cpu", ["none-beta1", "none-beta2", "none-beta3.5"], ("ranking-cpu",)),
    "overfitting": ("cpu", OVERFITTING, ()),
    "overfitting-plain": ("cpu", [*OVERFITTING, *PARTS], ()),
}
for name, (base, _, _) in EXPERIMENTS.items():
    own = {"lr_warmup": 1.0} if name.startswith("start") else {}
    if name.startswith("overfitting"):  # few images many times, the rate cut as where it was found
        own = {"train_size": 1000, "epochs": 100, "batch_size": 64, "schedule": "steps"}
        own["augment"] = not name.endswith("plain")
    PRESETS[name] = replace(PRESETS[base], auto_attack=0, surrogate=False, **own)


@dataclass(frozen=True)
class Place:
    """Folders that a run reads and writes."""

    runs: Path  # checkpoints and weights; not for the repository
    results: Path  # one JSON for each finished run
    data: str = "data"  # where CIFAR-10 is, or, with ``download``, goes
    label: str | None = None  # of the data beside results, if the files are not the originals
    device: str = "cpu"
    download: bool = False


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that all scripts have."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--preset", choices=PRESETS, default="digits")
    add("--data-dir", default="data", help="directory of cifar-10-batches-py (data)")
    add("--data-label", help="name of the data in results, for files that are not the originals")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--runs", type=Path, help="folder of checkpoints and weights (runs/robustness/PRESET)")
    add("--results", type=Path, help="folder of the JSON files")
    return found


def place_of(args: argparse.Namespace, name: str) -> Place:
    """Return the folders given by flags, or a preset's."""
    runs = args.runs or Path("runs") / "robustness" / name
    results = args.results or Path(__file__).parent / "results" / name
    return Place(runs, results, args.data_dir, args.data_label, args.device)


def options_of(preset: Preset, name: str) -> dict[str, Any]:
    """Return the settings of a method in a preset that are not its own."""
    kind = METHODS[name]
    own = kind.official.keys() - kind.named
    common = {k: v for k, v in preset.options.get("*", {}).items() if k in own}
    return {**kind.networks.get(preset.network, {}), **common, **preset.options.get(name, {})}


def needs(name: str, preset: Preset) -> tuple[str, ...]:
    """Return the methods whose weights this one wants: a teacher, or another's gradients."""
    if name == "at" or not (preset.surrogate or METHODS[name].taught):
        return ()
    return ("at",)


class Trainer(Setup):
    """One run: a method, a seed, a preset."""

    def __init__(self, name: str, seed: int, preset: Preset, place: Place) -> None:
        data = LOADERS[preset.data](place.data, place.download)
        data.label = place.label or data.label
        super().__init__(preset, seed, place.device, data)
        self.name, self.preset, self.place = name, preset, place
        self.stem = f"{name}-seed{seed}"

    def other(self, name: str) -> nn.Module:
        """Return the network that another method of this seed has trained, in eval mode."""
        file = self.place.runs / f"{name}-seed{self.seed}-last.pt"
        if not file.exists():
            raise DataError(
                f"{file} is missing: run the method that leaves it first, with `run.py "
                "--results` elsewhere if its result is committed: weights are not."
            )
        model = self.network()
        model.load_state_dict(torch.load(file, map_location=self.device, weights_only=True))
        return model.eval().requires_grad_(False)

    def start(self, warm: bool, report: Report | None = None) -> nn.Module:
        """Return the initial network: with random or with natural weights."""
        model = self.network()
        if warm:
            file = self.place.runs / f"natural-seed{self.seed}.pt"  # the same for all methods
            self.pretrain(model, file, file.with_name(f"{self.stem}-pre-training.pt"), report)
        return model

    def method(self, model: nn.Module, generator: torch.Generator) -> Method:
        p = self.preset
        setting = Setting(
            eps=p.eps, attack_steps=p.attack_steps, step_size=self.step_size, epochs=p.epochs,
            total_steps=self.steps_an_epoch * p.epochs, seed=self.seed, classes=self.classes,
            generator=generator, new_network=lambda: self.network(self.seed + 1000),
            new_optimizer=self.sgd, teacher=lambda: self.other("at"), autocast=self.autocast,
            attack=p.attack if self.device.type == "cuda" else "eager",
        )  # fmt: skip
        try:
            return METHODS[self.name](model, setting, **options_of(p, self.name))
        except ValueError as error:  # a run this short has no room for what the method wants
            raise DataError(f"{self.stem}, {setting.total_steps} steps: {error}") from error

    def run(self, report: Report | None = None) -> dict[str, Any]:
        """Train, evaluate and write the run's JSON; resume an earlier attempt."""
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
        model = self.start(METHODS[self.name].warm, report)
        generator = torch.Generator(self.device)
        method = self.method(model, generator)
        checkpoint, options = place.runs / f"{self.stem}.checkpoint", {"options": method.options}
        how = {"generator": generator, "settings": options, "report": report, **method.carried()}
        phase = Phase(self, self.stem, model, method.optimizer, p.epochs, checkpoint, **how)
        for epoch in phase.epochs():
            method.begin_epoch(epoch)
            for x, y in phase.batches():
                with self.autocast():
                    logged = method.step(x, y)
                phase.scheduler.step()
                phase.log(**logged)
        content = self.judge(phase, method)
        write_json(file, content)
        phase.checkpoint.unlink()  # the weights stay
        return content

    def judge(self, phase: Phase, method: Method) -> dict[str, Any]:
        """Evaluate the last and the best epoch on the test images."""
        p, place, model = self.preset, self.place, phase.model
        began = time.perf_counter()
        results = phase.judge(place.runs / self.stem)
        if p.auto_attack:
            some = self.test[: p.auto_attack]
            results["last"]["aa"] = evaluation.auto_attack(
                model, some.floats(), some.labels, p.eps, whole=p.whole_auto_attack
            )
        weights = {}
        for which in results:
            content = (place.runs / f"{self.stem}-{which}.pt").read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            weights[which] = {"bytes": len(content), "sha256": digest}
        surrogate = self.other("at") if p.surrogate and self.name != "at" else None
        some = partial(self.loader, self.test[: p.masking])
        masking = evaluation.masking(model, some, p.eps, surrogate)
        attacks = "standard" if p.whole_auto_attack else "APGD-CE and APGD-T"
        return {
            "method": self.name,
            "title": method.title,
            "start": "natural weights" if method.warm else "random weights",
            "data": self.label,
            "seed": self.seed,
            "preset": asdict(p),
            "options": json.loads(json.dumps(method.options)),
            "versions": versions(self.device),
            "images": {"train": len(self.train), "val": len(self.val), "test": len(self.test)},
            "auto_attack": f"{attacks} on {p.auto_attack} images" if p.auto_attack else None,
            "results": results,
            "weights": weights,
            "masking": {**masking, "suspicions": evaluation.is_masked(masking)},
            "seconds": {"training": phase.seconds, "evaluation": time.perf_counter() - began},
            "history": phase.history,
        }
