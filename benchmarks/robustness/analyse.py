"""Draw figures of finished runs, and write the numbers behind them.

    python benchmarks/robustness/analyse.py --preset digits --methods at,trades-pre,cure,cure-global
    python benchmarks/robustness/analyse.py --preset digits --blocks 8     # the block study instead

Reads the weights that `run.py` has left, writes pictures and ``analysis.json``, or ``blocks.json``,
beside the runs' JSON files, and prints a table of what they show.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import summary
import torch
import trainer
from analysis import blocks, corruptions, layers, smallest
from analysis.figure import COLOR, SHOWN, Pair, band, draw_rows, heading, interval, save
from harness.report import versions, write_json
from harness.training import columns, pgd20
from methods import METHODS
from torch import Tensor, nn
from trainer import PRESETS, Place, Preset, Trainer

from rgp_optim import pgd_attack

IMAGES = 500  # of the test images
PICTURES = ("at", "trades-pre", "cure-no-revision", "cure")  # whose perturbations are drawn
RADII = [i / 8 for i in range(33)]  # in units of the training attack's
LINES: dict[str, tuple[str, str, int, Pair]] = {  # axes, panels in a row, size
    "corruptions": ("severity", "accuracy, %", 6, (15, 5)),
    "smallest": ("radius of PGD-20, ε", "images still classified right, %", 1, (8, 4.3)),
    "gradients": ("layer", "mean |gradient| per weight", 2, (12, 4.5)),
    "updated": ("layer", "weights updated, %", 2, (12, 4.5)),
}


def look(
    name: str, seed: int, preset: Preset, place: Place, run: dict[str, Any]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what the figures show of a network; test images, their radii, the perturbed images.

    Lines by figure, panel and place on the horizontal axis.
    """
    one = Trainer(name, seed, preset, place)
    model = one.other(name).requires_grad_(True)
    some = one.test[:IMAGES]
    x, y = some.floats(), some.labels
    generator = torch.Generator(x.device).manual_seed(seed)
    x_adv = pgd_attack(model, x, y, generator=generator, **pgd20(preset.eps))
    radius, fooled = smallest.smallest_radius(model, x, y, most=4 * preset.eps, seed=seed)
    radius /= preset.eps
    right = {r: 100 * float((radius > r + 1e-4).float().mean()) for r in RADII}
    batches = zip(x.split(64), x_adv.split(64), strict=True)
    pairs = [pair for pair in batches if len(pair[0]) > 3]  # fewer have no estimate
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    cka = layers.cka(model, pairs, names)
    gradients = layers.gradient_sizes(model, x, x_adv, y)
    accuracies = corruptions.accuracies(model, x, y)
    accuracies["mean"] = np.mean([*accuracies.values()], axis=0).tolist()
    found: dict[str, Any] = {
        "corruptions": {c: dict(zip("12345", each, strict=True)) for c, each in accuracies.items()},
        "smallest": {"": right},
        "gradients": panels(gradients, "natural images", "attacked images"),
        "similarity": {"layers": names, "cka": cka},
    }
    if run["options"].get("scope") == "global":  # constant otherwise
        updated = layers.updated_early_and_late(run["history"])
        shares = {n: (100 * a, 100 * b) for n, (a, b) in updated.items() if n in gradients}
        found["updated"] = panels(shares, "first fifth of the epochs", "last fifth")
    found["measures"] = {
        "accuracy under corruptions, %": float(np.mean(accuracies["mean"])),
        "radius that fools half the images, ε": float(radius.clamp(max=4).median()),
        "CKA of a layer with itself": float(np.mean(np.diag(cka))),
        "gradient, attacked / natural": float(np.mean([b / a for a, b in gradients.values()])),
    }
    print(f"{name}, seed {seed}: {found['measures']}", flush=True)
    return found, [x, radius, fooled]


def panels(pairs: dict[str, Pair], first: str, second: str) -> dict[str, dict[str, float]]:
    """Return two panels of lines over the layers."""
    both = enumerate((first, second))
    return {title: {n.removesuffix(".weight"): p[i] for n, p in pairs.items()} for i, title in both}


def block_study(seed: int, preset: Preset, place: Place, epochs: int) -> dict[str, Any]:
    """Train natural weights by AT in some blocks; return accuracies for each choice of them."""
    one = Trainer("cure", seed, preset, place)
    rows = {}
    for label, learn in blocks.combinations(list(blocks.blocks_of(one.network()))).items():
        model = one.start(warm=True)
        generator = torch.Generator(one.device).manual_seed(seed)
        attack = {"eps": preset.eps, "steps": preset.attack_steps, "step_size": one.step_size}
        attack["generator"] = generator
        if learn:
            batches = partial(one.train.batches, preset.batch_size, generator)
            how = {"epochs": epochs, "lr": preset.lr, "attack": attack}
            blocks.train(model, learn, batches, **how)
        rows[f"U-{label}"] = columns(model, partial(one.loader, one.test), preset.eps)
        print(f"U-{label}, seed {seed}: {rows[f'U-{label}']}", flush=True)
    return {"data": one.label, "preset": asdict(preset), "rows": rows}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return Markdown: means over the seeds; in brackets the last row minus this one, paired."""
    *_, last = rows.values()
    lines = [["", *last[0]]]
    for title, each in rows.items():
        lines.append([title])
        for key in last[0]:
            values, best = ([one[key] for one in some] for some in (each, last))
            lead = np.subtract(best, values)
            paired = len(lead) > 1 and each is not last
            said = f" ({lead.mean():+.2g} ± {interval(lead):.2g})" if paired else ""
            lines[-1].append(f"{np.mean(values):.3g}{said}")
    return summary.markdown(lines)


# Figures.


def draw_lines(figure: Any, methods: dict[str, Any], kind: str) -> None:
    """Show one of `LINES`: means over the seeds with intervals."""
    xlabel, ylabel, wide, _ = LINES[kind]
    shown = {name: networks for name, networks in methods.items() if kind in networks[0]}
    titles = list(next(iter(shown.values()))[0][kind])
    axes = figure.subplots(-(-len(titles) // wide), wide, sharey=True, squeeze=False).ravel()
    for axis, title in zip(axes, titles, strict=False):
        for name, networks in shown.items():
            x, label = list(networks[0][kind][title]), METHODS[name].title
            rows = [list(one[kind][title].values()) for one in networks]
            band(axis, x, rows, COLOR[name], label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        if xlabel == "layer":
            axis.tick_params(axis="x", rotation=90, labelsize=7)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    if kind == "gradients":
        axes[0].set_yscale("log")
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside right center", frameon=False)


def draw_similarity(figure: Any, methods: dict[str, Any]) -> None:
    rows, how = min(2, len(methods)), {"sharex": True, "sharey": True, "squeeze": False}
    axes = figure.subplots(rows, -(-len(methods) // rows), **how)
    for axis, (name, networks) in zip(axes.flat, methods.items(), strict=False):
        matrix = np.mean([one["similarity"]["cka"] for one in networks], axis=0)
        picture = axis.imshow(matrix, vmin=0, vmax=1)
        layers = networks[0]["similarity"]["layers"]
        axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set_title(METHODS[name].title, fontsize=10)
    for axis in axes.flat[len(methods) :]:
        axis.set_axis_off()
    figure.colorbar(picture, ax=axes, label="linear CKA", shrink=0.7)
    figure.supxlabel("columns: attacked images; rows: natural images", fontsize=10)


def draw_blocks(figure: Any, rows: dict[str, list[dict[str, float]]]) -> None:
    found = {b: {key: [row[key] for row in each] for key in SHOWN} for b, each in rows.items()}
    draw_rows(figure, {b: ("#0072B2", "o", each) for b, each in found.items()})


def draw_perturbations(figure: Any, images: dict[str, list[Tensor]]) -> None:
    """Show images that the networks of one seed get right, and their smallest perturbations."""
    right = torch.stack([radius > 0 for _, radius, _ in images.values()]).all(0)
    chosen = right.nonzero().flatten()[:8].tolist()
    axes = figure.subplots(1 + 2 * len(images), 8, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for i, (name, (x, radius, fooled)) in enumerate(images.items()):
        scale = 2 * max(float((fooled - x)[chosen].abs().max()), 1e-6)
        for column, j in enumerate(chosen):
            shown = {0: x[j], 1 + 2 * i: fooled[j], 2 + 2 * i: 0.5 + (fooled[j] - x[j]) / scale}
            for row, image in shown.items():
                picture = image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).cpu().numpy()
                axes[row, column].imshow(picture, cmap="gray", vmin=0, vmax=1)
            far = f"{float(radius[j]):.2f} ε" if radius[j] < torch.inf else "> 4 ε"
            axes[1 + 2 * i, column].set_title(far, fontsize=8)
        axes[1 + 2 * i, 0].set_ylabel(METHODS[name].title.replace(" ", "\n"), fontsize=7)


def main(argv: list[str] | None = None) -> None:
    parser = trainer.parser(__doc__)
    add = parser.add_argument
    add("--methods", default="at,trades,trades-pre,cure-no-revision,cure-global,cure")
    add("--seeds", default="0,1,2", help="comma-separated seeds (0,1,2)")
    add("--blocks", type=int, help="epochs of the block study, in place of the rest")
    args = parser.parse_args(argv)
    place, preset = trainer.place_of(args, args.preset), PRESETS[args.preset]
    names, seeds = args.methods.split(","), [int(seed) for seed in args.seeds.split(",")]
    out = place.results / "analysis"
    out.mkdir(parents=True, exist_ok=True)
    found = {"preset": args.preset, "seeds": seeds, "versions": versions(torch.device(args.device))}
    if args.blocks:
        study = {seed: block_study(seed, preset, place, args.blocks) for seed in seeds}
        labels = study[seeds[0]]["rows"]
        found["rows"] = {b: [each["rows"][b] for each in study.values()] for b in labels}
        title = heading({"blocks": study})
        save(out / "blocks.png", partial(draw_blocks, rows=found["rows"]), (7, 5), title)
        write_json(out / "blocks.json", {**found, "epochs": args.blocks})
        print(table(found["rows"]))
        return
    every = summary.read(place.results)
    runs = {name: {seed: every[name][seed] for seed in seeds} for name in names}
    methods: dict[str, Any] = {name: [] for name in names}
    images = {}
    for name, seed in product(names, reversed(seeds)):  # of the first seed, images are kept
        numbers, images[name] = look(name, seed, preset, place, runs[name][seed])
        methods[name].insert(0, numbers)
    show = partial(save, title=heading(runs))
    for kind, (*_, size) in LINES.items():
        if any(kind in networks[0] for networks in methods.values()):
            show(out / f"{kind}.png", partial(draw_lines, methods=methods, kind=kind), size)
    show(out / "similarity.png", partial(draw_similarity, methods=methods), (10, 7))
    drawn = {name: images[name] for name in PICTURES if name in images}
    size = (8, 1.6 + 2 * len(drawn))
    show(out / "perturbations.png", partial(draw_perturbations, images=drawn), size)
    write_json(out / "analysis.json", {**found, "images": IMAGES, "methods": methods})
    print(table({METHODS[n].title: [one["measures"] for one in methods[n]] for n in names}))
    print(f"figures and analysis.json are in {out}")


if __name__ == "__main__":
    main()
