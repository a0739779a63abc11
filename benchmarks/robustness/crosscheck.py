"""Compare our attacks with Foolbox's and AutoAttack's, on networks trained by run.py.

    python benchmarks/robustness/crosscheck.py --preset digits --json crosscheck.json

PGD-20 from the clean image is taken by `pgd_attack` and by Foolbox (Rauber et al., JOSS 2020): the
images should be the same. From a random start the draws differ, so only the accuracies are
comparable. AutoAttack comes with its first two attacks, as in the table, and with all four.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluation
import foolbox
import summary
import torch
import trainer
from foolbox.attacks import LinfProjectedGradientDescentAttack
from harness.image_data import DataError
from harness.report import versions, write_json
from harness.training import accuracy, pgd20
from methods import METHODS
from torch import Tensor, nn
from trainer import PRESETS, Trainer

from rgp_optim import pgd_attack

SAME = 1e-6  # pixels that differ by less are equal but for rounding
COLUMNS = {
    "natural": "Natural", "ours": "PGD-20", "foolbox": "Foolbox", "same": "same images",
    "ours_random": "PGD-20, random start", "foolbox_random": "Foolbox, random start",
    "margin": "C&W", "aa_two": "AA, two attacks", "aa": "AA, all four",
}  # fmt: skip


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor, random_start: bool, **pgd: Any) -> Tensor:
    """Return the images of Foolbox's PGD."""
    attack = LinfProjectedGradientDescentAttack(
        abs_stepsize=pgd["step_size"], steps=pgd["steps"], random_start=random_start
    )
    peer = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=x.device)
    images: Tensor = attack.run(peer, x, y, epsilon=pgd["eps"])
    return images.detach()


def compare(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Return accuracies in percent, and the percentage of images that both PGDs find alike."""
    how = pgd20(eps)

    def right(images: Tensor) -> float:
        return accuracy(model, lambda: [(images, y)])

    generator = torch.Generator(x.device).manual_seed(0)
    torch.manual_seed(0)
    ours = pgd_attack(model, x, y, random_start=False, **how)
    theirs = by_foolbox(model, x, y, False, **how)
    alike = (ours - theirs).abs().flatten(1).amax(1) <= SAME
    return {
        "natural": right(x),
        "ours": right(ours),
        "foolbox": right(theirs),
        "same": 100 * float(alike.float().mean()),
        "ours_random": right(pgd_attack(model, x, y, generator=generator, **how)),
        "foolbox_random": right(by_foolbox(model, x, y, True, **how)),
        "margin": right(pgd_attack(model, x, y, loss="margin", generator=generator, **how)),
        "aa_two": evaluation.auto_attack(model, x, y, eps, whole=False),
        "aa": evaluation.auto_attack(model, x, y, eps, whole=True),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: a row for each network."""
    lines = [["network", *COLUMNS.values()]]
    for row in rows:
        name = f"{row['method']}, seed {row['seed']}"
        lines.append([name, *(f"{row[c]:.1f}" for c in COLUMNS)])
    return summary.markdown(lines)


def main(argv: list[str] | None = None) -> None:
    parser = trainer.parser(__doc__)
    add = parser.add_argument
    add("--methods", default="at,trades,cure", help="comma-separated methods (at,trades,cure)")
    add("--seed", type=int, default=0)
    add("--images", type=int, default=200, help="test images (200)")
    add("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    names = args.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}.")
    preset = PRESETS[args.preset]
    rows, place = [], trainer.place_of(args, args.preset)
    try:
        one = Trainer(names[0], args.seed, preset, place)
        images = one.test[: args.images]
        for name in names:
            numbers = compare(one.other(name), images.floats(), images.labels, preset.eps)
            rows.append({"method": name, "seed": args.seed, **numbers})
    except DataError as error:
        sys.exit(f"error: {error}")
    if args.json:
        told = {**versions(one.device), "foolbox": foolbox.__version__}
        content = {"data": one.label, "preset": args.preset, "eps": preset.eps}
        write_json(args.json, {**content, "images": len(images), "versions": told, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
