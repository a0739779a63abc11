"""Look at what finished runs have learnt: figures, and the numbers they are drawn from.

    python benchmarks/robustness/analyse.py --preset digits --methods at,trades-pre,cure,cure-global

Reads the weights that `run.py` has left, and writes ``analysis.json`` and pictures beside
the runs' JSON files.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import summary
import torch
import trainer
from analysis import blocks, corruptions, layers, smallest
from analysis.figure import COLORS, draw_curves, save
from harness.report import versions, write_json
from harness.training import columns, pgd20
from methods import METHODS
from trainer import PRESETS, Place, Preset, Trainer

from rgp_optim import pgd_attack

IMAGES = 256  # for what costs many passes
PICTURES = ("at", "trades-pre", "cure-no-revision", "cure")  # whose perturbations are drawn
ABOVE: dict[str, Any] = {"loc": "outside upper center", "ncols": 6, "frameon": False}


def collect(
    methods: Sequence[str], seed: int, preset: Preset, place: Place, study: int
) -> dict[str, Any]:
    """Return everything that the figures show, as plain numbers."""
    found: dict[str, Any] = {"preset": preset.data, "seed": seed, "methods": {}}
    runs = summary.read(place.results)
    for name in methods:
        one = Trainer(name, seed, preset, place)
        model = one.other(name).requires_grad_(True)
        some = one.test[:IMAGES]
        x, y = some.floats(), some.labels
        generator = torch.Generator(x.device).manual_seed(seed)
        x_adv = pgd_attack(model, x, y, generator=generator, **pgd20(preset.eps))
        most = 4 * preset.eps
        radius, _ = smallest.smallest_radius(model, x, y, most=most, seed=seed)
        pairs = zip(x.split(64), x_adv.split(64), strict=True)
        stages = [f"stages.{i}" for i in range(len(model.stages))]
        found["methods"][name] = {
            "title": METHODS[name].title,
            "corruptions": corruptions.accuracies(model, x, y),
            "smallest": {"most": most, "radii": sorted(radius.clamp(max=most).tolist())},
            "cka": layers.cka(model, pairs, ["conv", *stages]),
            "gradients": layers.gradient_sizes(model, x, x_adv, y),
            "updated": layers.updated_early_and_late(runs[name][seed]["history"]),
        }
        print(f"{name} looked at", flush=True)
    found["blocks"] = block_study(seed, preset, place, study)
    return found


def block_study(seed: int, preset: Preset, place: Place, epochs: int) -> dict[str, Any]:
    """Train natural weights by AT in each single block, in none, and in all."""
    one = Trainer("cure", seed, preset, place)
    names = list(blocks.blocks_of(one.network()))
    rows = {}
    for learn in [[], *([name] for name in names), names]:
        model = one.start(warm=True)
        generator = torch.Generator(one.device).manual_seed(seed)
        attack = {"eps": preset.eps, "steps": preset.attack_steps, "step_size": one.step_size}
        attack["generator"] = generator
        if learn:
            batches = partial(one.train.batches, preset.batch_size, generator)
            how = {"epochs": epochs, "lr": preset.lr, "attack": attack}
            blocks.train(model, blocks.blocks_of(model), learn, batches, **how)
        label = "all" if learn == names else "none" if not learn else learn[0]
        rows[label] = columns(model, one.batches(one.test), preset.eps)
        print(f"U-{label}: {rows[label]}", flush=True)
    return {"epochs": epochs, "rows": rows}


# Figures.


def _each(found: dict[str, Any]) -> Any:
    entries = found["methods"].values()
    return [(entry["title"], color, entry) for color, entry in zip(cycle(COLORS), entries)]


def draw_corruptions(figure: Any, found: dict[str, Any]) -> None:
    names = list(corruptions.CORRUPTIONS)
    axes = figure.subplots(2, -(-len(names) // 2), sharex=True, sharey=True).flat
    for axis, name in zip(axes, names, strict=False):
        for title, color, entry in _each(found):
            values = entry["corruptions"][name]
            axis.plot(range(1, 6), values, "o-", ms=3, color=color, label=title)
        axis.set_title(name, fontsize=10)
        axis.grid(axis="y", alpha=0.25)
    figure.supxlabel("severity")
    figure.supylabel("accuracy in %")
    figure.legend(*axis.get_legend_handles_labels(), **ABOVE)


def draw_smallest(figure: Any, found: dict[str, Any]) -> None:
    axis = figure.subplots()
    for title, color, entry in _each(found):
        radii = entry["smallest"]["radii"]
        share = [100 * (1 - i / len(radii)) for i in range(len(radii))]
        axis.step(radii, share, where="post", color=color, label=title)
    axis.set(xlabel="radius of PGD-20", ylabel="images still classified right, %", ylim=(0, 101))
    axis.axvline(PRESETS[found["name"]].eps, color="black", alpha=0.3, lw=1, ls=":")
    axis.legend(frameon=False)


def draw_layers(figure: Any, found: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for title, color, entry in _each(found):
        left.plot(*zip(*entry["cka"].items(), strict=True), "o-", ms=4, color=color, label=title)
        sizes = entry["gradients"]
        right.plot([b for _, b in sizes.values()], "o-", ms=3, color=color)
        right.plot([a for a, _ in sizes.values()], "o--", ms=3, color=color, alpha=0.5)
    left.set(ylabel="CKA of natural and attacked features", ylim=(None, 1.01))
    right.set(yscale="log", ylabel="mean |gradient| per weight", xlabel="layer, in order")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_title("attacked (solid), natural (dashed) images", fontsize=10)
    left.legend(frameon=False, fontsize=9)


def draw_updated(figure: Any, found: dict[str, Any]) -> None:
    axis = figure.subplots()
    shown = [each for each in _each(found) if each[2]["updated"]]
    for title, color, entry in shown:
        pairs = {n: v for n, v in entry["updated"].items() if n in entry["gradients"]}
        axis.plot([100 * a for a, _ in pairs.values()], "o--", ms=3, color=color, alpha=0.5)
        axis.plot([100 * b for _, b in pairs.values()], "o-", ms=3, color=color, label=title)
        axis.set_xticks(range(len(pairs)), list(pairs), rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="weights updated, %", ylim=(0, 102))
    axis.set_title("first fifth of the epochs (dashed), last fifth (solid)", fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    if shown:
        axis.legend(frameon=False)


def draw_blocks(figure: Any, found: dict[str, Any]) -> None:
    axis = figure.subplots()
    for color, (label, row) in zip(COLORS, found["blocks"]["rows"].items(), strict=False):
        axis.plot(row["natural"], row["pgd20"], "o", color=color, label=f"U-{label}")
    axis.set(xlabel="natural accuracy, %", ylabel="PGD-20 accuracy, %")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)


def draw_perturbations(
    figure: Any, methods: Sequence[str], seed: int, preset: Preset, place: Place
) -> None:
    """Show images, and the smallest perturbation of each network that was found, enlarged.

    The first images that all these networks take for what they are.
    """
    one = Trainer(methods[0], seed, preset, place)
    models = {name: one.other(name) for name in methods}
    some = one.test[:IMAGES]
    right = [model(some.floats()).argmax(1) == some.labels for model in models.values()]
    test = some[torch.stack(right).all(0)][:8]
    x, y = test.floats(), test.labels
    axes = figure.subplots(1 + 2 * len(methods), 8)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (name, model) in enumerate(models.items()):
        radius, fooled = smallest.smallest_radius(model, x, y, most=4 * preset.eps, seed=seed)
        scale = max(float((fooled - x).abs().max()), 1e-6)
        for j in range(len(test)):
            difference = 0.5 + (fooled[j] - x[j]) / (2 * scale)
            for row, image in ((0, x[j]), (1 + 2 * i, fooled[j]), (2 + 2 * i, difference)):
                picture = image.permute(1, 2, 0).clamp(0, 1)
                axes[row, j].imshow(picture.squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            far = float(radius[j])
            title = f"{far:.3f}" if math.isfinite(far) else f"> {4 * preset.eps:.3f}"
            axes[1 + 2 * i, j].set_title(title, fontsize=8)
        first = axes[1 + 2 * i, 0]
        where = {"rotation": 90, "va": "center", "ha": "right", "transform": first.transAxes}
        first.text(-0.1, 0.5, METHODS[name].title, fontsize=8, **where)


def main(argv: list[str] | None = None) -> None:
    parser = trainer.parser(__doc__)
    add = parser.add_argument
    add("--methods", default="at,trades,trades-pre,cure-no-revision,cure,cure-global")
    add("--seed", type=int, default=0)
    add("--blocks", type=int, default=8, help="epochs of the block study (8)")
    args = parser.parse_args(argv)
    place, preset = trainer.place_of(args, args.preset), PRESETS[args.preset]
    methods, out = args.methods.split(","), place.results / "analysis"
    out.mkdir(parents=True, exist_ok=True)
    found = {"name": args.preset, **collect(methods, args.seed, preset, place, args.blocks)}
    found |= {"data": place.label or preset.data, "versions": versions(torch.device(args.device))}
    write_json(out / "analysis.json", json.loads(json.dumps(found)))
    runs = summary.read(place.results)
    curves = {name: of[args.seed] for name, of in runs.items() if name in methods}
    pictures = [name for name in PICTURES if name in methods]
    shown = {"methods": pictures, "seed": args.seed, "preset": preset, "place": place}
    figures: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
        "corruptions": (partial(draw_corruptions, found=found), (13, 5.5)),
        "smallest": (partial(draw_smallest, found=found), (6, 4)),
        "layers": (partial(draw_layers, found=found), (11, 4)),
        "updated": (partial(draw_updated, found=found), (8, 4.5)),
        "blocks": (partial(draw_blocks, found=found), (6, 4.5)),
        "curves": (partial(draw_curves, runs=curves), (12, 4)),
        "perturbations": (partial(draw_perturbations, **shown), (8, 1 + 2 * len(pictures))),
    }
    for name, (draw, size) in figures.items():
        save(out / f"{name}.png", draw, size)
    print(f"figures and analysis.json are in {out}")


if __name__ == "__main__":
    main()
