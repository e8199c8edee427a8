"""Computes the whole cost map, finds the k classes of its largest values, and computes their cost again."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import unit


def cost_filter(image: Tensor, text: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``image`` [B, H, W, D], ``text`` [1 or B, T, P, D] → cost [B, k, P, H, W], index [B, k], score [B, k]."""
    image, text = unit(image), unit(text).expand(len(image), -1, -1, -1)
    cost_map = torch.einsum("bhwd,btpd->btphw", image, text)  # (5.2)
    score, index = top_classes(cost_map.detach().amax(dim=(2, 3, 4)), k)  # (5.3), (5.4)
    kept = text.take_along_dim(index[:, :, None, None], dim=1)  # (5.5)
    return torch.einsum("bhwd,bkpd->bkphw", image, kept), index, score  # (5.6)


def top_classes(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``score`` [B, T] → the k best of each row, best first, NaN above all, ties by lower class; and their classes."""
    score, index = score.sort(dim=1, descending=True, stable=True)
    return score[:, :k], index[:, :k]
