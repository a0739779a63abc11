"""The networks of the example: ResNets for small images, with normalisation inside.

Inputs are images in [0, 1], [batch, channels, height, width]; outputs are logits, [batch, classes].
Residual networks: He et al., CVPR 2016; with pre-activation: He et al., ECCV 2016; wide: Zagoruyko
and Komodakis, BMVC 2016. The stem for small images (a 3x3 convolution, no pooling) is the usual one
for CIFAR.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """The same with normalisation and activation before each convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return h + short


class ResNet(nn.Module):
    """Stages of blocks; each stage after the first halves the image and doubles the channels.

    ``widen`` multiplies the channels of the stages, not those of the stem.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        *,
        channels: int = 3,
        classes: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        preact: bool = False,
        widen: int = 1,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean or [0.0] * channels).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std or [1.0] * channels).view(1, -1, 1, 1))
        block = PreActBlock if preact else Block
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.Identity() if preact else nn.BatchNorm2d(width)
        stages, c_in = [], width
        for i, count in enumerate(blocks):
            c_out = width * widen * 2**i
            layers = [
                block(c_in if j == 0 else c_out, c_out, 2 if i > 0 and j == 0 else 1)
                for j in range(count)
            ]
            stages.append(nn.Sequential(*layers))
            c_in = c_out
        self.stages = nn.Sequential(*stages)
        self.last_norm = nn.BatchNorm2d(c_in) if preact else nn.Identity()
        self.fc = nn.Linear(c_in, classes)
        self.preact = preact

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv((x - self.mean) / self.std)
        if not self.preact:
            h = F.relu(self.norm(h))
        h = self.stages(h)
        if self.preact:
            h = F.relu(self.last_norm(h))
        return self.fc(h.mean((2, 3)))


NETWORKS = {
    "resnet18": lambda **o: ResNet([2, 2, 2, 2], 64, **o),  # 11.2 million weights
    "preactresnet18": lambda **o: ResNet([2, 2, 2, 2], 64, preact=True, **o),
    "wrn34-10": lambda **o: ResNet([5, 5, 5], 16, preact=True, widen=10, **o),  # 46.2 million
    "resnet8": lambda **o: ResNet([1, 1, 1], 16, **o),  # 78 thousand weights, for a CPU
}
