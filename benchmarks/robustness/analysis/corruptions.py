"""Accuracy under common corruptions, by type and severity.

Generated from our images with the constants of ``make_cifar_c.py`` (Hendrycks and Dietterich,
ICLR 2019): results are in the style of CIFAR-10-C, not on CIFAR-10-C. Images are [batch, channels,
height, width] in [0, 1]; the constants are for images of 32 x 32 pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def _normal(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g, device=x.device)


def gaussian_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return x + c * _normal(x, g)


def speckle_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return x + c * x * _normal(x, g)


def shot_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    return torch.poisson(x * c, generator=g) / c


def impulse_noise(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    """Set a fraction ``c`` of the values to 0 or 1."""
    hit = torch.rand(x.shape, generator=g, device=x.device)
    x = torch.where(hit < c / 2, torch.zeros_like(x), x)
    return torch.where(hit >= 1 - c / 2, torch.ones_like(x), x)


def gaussian_blur(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    """Blur by a Gaussian of standard deviation ``c``, cut off at four of them."""
    radius = int(4 * c + 0.5)
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(at**2) / (2 * c * c))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[..., None, :], groups=x.shape[1])
    return F.conv2d(x, kernel[..., :, None], groups=x.shape[1])


def contrast(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def brightness(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    """Add ``c`` to the value of hue, saturation, value."""
    value = x.amax(1, keepdim=True)
    raised = (value + c).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-12), raised)


def through_pillow(x: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """Apply a Pillow operation to each image, in eight bits."""
    from PIL import Image

    out = []
    for image in (x * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        pixels = np.asarray(change(picture), dtype=np.float32) / 255
        out.append(torch.from_numpy(pixels.reshape(image.shape)).permute(2, 0, 1))
    return torch.stack(out).to(x)


def jpeg(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    """Encode each image with quality ``c`` and decode it."""
    from PIL import Image

    def coded(picture: Any) -> Any:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(c))
        return Image.open(file)

    return through_pillow(x, coded)


def pixelate(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    """Average over boxes, then repeat pixels."""
    size = x.shape[-2:]
    small = [max(1, int(side * c)) for side in size]
    return through_pillow(x, lambda im: im.resize(small[::-1], 4).resize(size[::-1], 4))  # 4: BOX


def zoom_blur(x: Tensor, c: float, g: torch.Generator) -> Tensor:
    """Average the image with its enlargements up to ``c``, in steps of 0.01."""
    size = x.shape[-1]
    total, count = x.clone(), 1
    for zoom in np.arange(1, c, 0.01):
        crop = math.ceil(size / zoom)
        first = (size - crop) // 2
        part = x[..., first : first + crop, first : first + crop]
        wide = round(crop * zoom)
        large = F.interpolate(part, (wide, wide), mode="bilinear", align_corners=True)
        first = (wide - size) // 2
        total += large[..., first : first + size, first : first + size]
        count += 1
    return total / count


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot noise": (shot_noise, (500, 250, 100, 75, 50)),
    "speckle noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "impulse noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "zoom blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "JPEG": (jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}


def corrupt(x: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Return images with a corruption of severity 1 to 5, in [0, 1]."""
    function, constants = CORRUPTIONS[name]
    generator = torch.Generator(x.device).manual_seed(seed)
    return function(x, constants[severity - 1], generator).clamp(0, 1)


@torch.no_grad()
def accuracies(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Return the accuracy in percent for each corruption, one number for each severity."""
    model.eval()

    def accuracy(name: str, severity: int) -> float:
        return 100 * float((model(corrupt(x, name, severity)).argmax(1) == y).float().mean())

    return {name: [accuracy(name, severity) for severity in range(1, 6)] for name in CORRUPTIONS}
