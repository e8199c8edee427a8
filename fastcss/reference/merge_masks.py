"""Resizes every mask as SAM does, then paints the masks over each other, the best last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_masks(
    masks: Tensor, scores: Tensor, order: Tensor, size: tuple[int, int], crop: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """``masks`` [K, h, w], ``scores`` [K], ``order`` [K] best first → labels and winning score, both [H, W]."""
    labels, score = torch.zeros(size, dtype=torch.int64, device=masks.device), scores.new_zeros(size)
    for k in order.flip(0).tolist():
        whole = F.interpolate(masks[None, None, k], scale_factor=4, mode="bilinear", align_corners=False)
        mask = F.interpolate(whole[..., : crop[0], : crop[1]], size, mode="bilinear", align_corners=False)
        labels[mask[0, 0] > threshold] = k + 1
        score[mask[0, 0] > threshold] = scores[k]
    return labels, score
