"""What the loops of this folder share: scikit-learn's digits and a small network."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


@torch.no_grad()
def accuracy(model, batches):
    """Share of the natural images that are classified right, in percent."""
    hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    return 100 * torch.cat(hits).mean().item()
