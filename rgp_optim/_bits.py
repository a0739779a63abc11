"""Masks as bits, eight weights to a byte, the first in the lowest bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(mask: Tensor) -> Tensor:
    """Return the bits of a bool tensor, in row-major order, as uint8 of shape (ceil(n / 8),)."""
    flat = pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) << places).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """Return the bool tensor with the shape and device of ``like``."""
    bits = bits.to(like.device)
    rows = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=like.device)) & 1
    return rows.view(-1)[: like.numel()].view(like.shape).to(torch.bool)
