"""Square images of patches, and what a patch sees of them, written out."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 8  # of all images, in patches


def image(before: int = 0, after: int = 0) -> dict[str, object]:
    return {"image": {"size": [SIDE, SIDE], "before": before, "after": after}}


def neighbors(kernel: int, before: int = 0, after: int = 0) -> Tensor:
    """The `kernel` patches nearest to a patch along both axes, pushed inward at the border; all other tokens see and are seen."""
    place = torch.arange(SIDE)
    start = (place - kernel // 2).clamp(0, SIDE - kernel)
    axis = (start[:, None] <= place) & (place < start[:, None] + kernel)
    both = (axis[:, None, :, None] & axis[None, :, None, :]).reshape(SIDE**2, SIDE**2)
    return around(both, before, after)


def disk(radius: int, before: int = 0, after: int = 0) -> Tensor:
    y, x = torch.arange(SIDE**2) // SIDE, torch.arange(SIDE**2) % SIDE
    return around((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2, before, after)


def around(patches: Tensor, before: int, after: int) -> Tensor:
    seen = torch.ones(before + SIDE**2 + after, before + SIDE**2 + after, dtype=torch.bool)
    seen[before : before + SIDE**2, before : before + SIDE**2] = patches
    return seen


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
