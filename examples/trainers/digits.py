"""Shared by all loops of this folder: scikit-learn's digits, a small network, CURE's losses."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rgp_optim import RGPSelectiveOptimizer, kl_adv_loss, kl_attack

EPS = 0.15  # of the attack, on pixels in [0, 1]


def loader(batch_size=64, images=512, sampler=None):
    """Images, [batch, 1, 8, 8] in [0, 1], and labels 0 to 9, always in the same order."""
    data = load_digits()
    x = torch.from_numpy(data.images[:images]).float().unsqueeze(1) / 16
    dataset = TensorDataset(x, torch.from_numpy(data.target[:images]))
    if sampler is not None:
        sampler = sampler(dataset)
    return DataLoader(dataset, batch_size, sampler=sampler)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def optimizer(model, reviser=None):
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return RGPSelectiveOptimizer(sgd, update_fraction=0.7, alpha=0.1, reviser=reviser)


def cure_losses(model, reviser, x, y, attacked=None):
    """The training loss, and the two cross-entropies that score the weights."""
    x_adv = kl_attack(attacked or model, x, eps=EPS, steps=3)
    logits, logits_adv = model(x), model(x_adv)
    loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
    loss = loss + reviser(x, x_adv, logits, logits_adv)
    natural, adversarial = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    return loss, {"natural": natural, "adversarial": adversarial}


@torch.no_grad()
def accuracy(model, batches):
    """Share of the natural images that are classified right, in percent."""
    hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    return 100 * torch.cat(hits).mean().item()
