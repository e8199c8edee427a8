"""Finds the largest cost of some classes at a time; only the maps of the kept classes exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import unit

# So many elements of the cost map exist at a time.
ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


def cost_filter(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``image`` [B, H, W, D], ``text`` [1 or B, T, P, D] → cost [B, k, P, H, W], index [B, k], score [B, k]."""
    (batch, height, width, _), prompts = image.shape, text.shape[2]
    pixels = unit(image).flatten(1, 2)  # [B, HW, D]
    text = unit(text).expand(batch, -1, -1, -1)
    with torch.no_grad():
        size = max(1, ELEMENTS.get(image.device.type, 1 << 24) // max(1, batch * prompts * height * width))
        best = [_cost(part, pixels).unflatten(1, (-1, prompts)).amax(dim=(2, 3)) for part in text.split(size, dim=1)]
        score, index = top_classes(torch.cat(best, dim=1).detach(), k)  # no_grad lets tangents through
    kept = text.take_along_dim(index[:, :, None, None], dim=1)
    return _cost(kept, pixels).view(batch, k, prompts, height, width), index, score


def _cost(text: Tensor, pixels: Tensor) -> Tensor:
    """``text`` [B, T, P, D], ``pixels`` [B, HW, D] → [B, T·P, HW]."""
    return torch.bmm(text.flatten(1, 2), pixels.mT)


def top_classes(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``score`` [B, T] → the k best of each row, best first, NaN above all, ties by lower class; and their classes."""
    score, index = score.sort(dim=1, descending=True, stable=True)  # torch.topk leaves the order of ties open
    return score[:, :k], index[:, :k]
