"""The block study "U-b": which blocks have to learn for a natural network to become robust?

Load natural weights, re-initialise the blocks in b, freeze every other block with its BatchNorm
statistics, and train adversarially.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgp_optim import pgd_attack


def prepare(model: nn.Module, blocks: dict[str, nn.Module], learn: Sequence[str]) -> None:
    """Re-initialise the blocks named in ``learn``; freeze all others."""
    for p in model.parameters():
        p.requires_grad_(False)
    for name in learn:
        for module in blocks[name].modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        blocks[name].requires_grad_(True)


def train(
    model: nn.Module,
    learn: Sequence[str],
    batches: Callable[[], Any],
    *,
    epochs: int,
    lr: float,
    attack: dict[str, Any],
) -> None:
    """Prepare the network and train the blocks in ``learn`` by AT, with a cosine schedule."""
    blocks = blocks_of(model)
    prepare(model, blocks, learn)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in batches():
            x_adv: Tensor = pgd_attack(model, x, y, **attack)
            model.eval()  # statistics of what is frozen, too
            for name in learn:
                blocks[name].train()
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    model.eval()
    model.requires_grad_(True)


def blocks_of(model: Any) -> dict[str, nn.Module]:
    """Return the examples' networks as blocks: stem, stages from 1 on, and, counted on, head."""
    stages = {str(i + 1): stage for i, stage in enumerate(model.stages)}
    stem = nn.ModuleList([model.conv, model.norm])
    head = nn.ModuleList([model.last_norm, model.fc])
    return {"stem": stem, **stages, str(len(stages) + 1): head}


def combinations(names: Sequence[str]) -> dict[str, list[str]]:
    """Return what learns: no block, each one, each two neighbours but for the stem, all."""
    pairs = pairwise(names[1:])
    some = [*([name] for name in names), *(list(pair) for pair in pairs)]
    return {"none": [], **{"".join(learn): learn for learn in some}, "all": list(names)}
