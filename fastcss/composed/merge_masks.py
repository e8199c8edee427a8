"""Resizes one mask at a time to full size, without reading the order from a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_masks(
    masks: Tensor, scores: Tensor, order: Tensor, size: tuple[int, int], crop: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """``masks`` [K, h, w], ``scores`` [K], ``order`` [K] best first → labels and winning score, both [H, W]."""
    labels, score = torch.zeros(size, dtype=torch.int64, device=masks.device), scores.new_zeros(size)
    for k in order.flip(0).unbind():
        mask = masks.index_select(0, k[None])[None]
        whole = F.interpolate(mask, scale_factor=4, mode="bilinear", align_corners=False)
        above = F.interpolate(whole[..., : crop[0], : crop[1]], size, mode="bilinear", align_corners=False) > threshold
        labels = torch.where(above[0, 0], k + 1, labels)
        score = torch.where(above[0, 0], scores.index_select(0, k[None]), score)
    return labels, score
