"""Samples every level by grid_sample at its points, then takes the weighted sum, as transformers' module does. Each
head has an image of its own, as there, whose strides 16 bits can count (see composed)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """``value`` [B, S, heads, D], ``offsets`` [B, Q, heads, levels, points, 2] → [B, Q, heads · D]."""
    heads = value.shape[2]
    weights = logits.flatten(3).softmax(dim=3).transpose(1, 2)  # [B, heads, Q, levels · points]
    grids = 2 * locations(shapes, reference_points, offsets) - 1
    sampled = []
    for level, part in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        image = part.permute(0, 2, 3, 1).contiguous().flatten(0, 1).unflatten(2, shapes[level])  # [B · heads, D, h, w]
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B · heads, Q, points, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.cat(sampled, dim=3).unflatten(0, (-1, heads))  # [B, heads, D, Q, levels · points]
    return torch.einsum("bhdqp,bhqp->bqhd", sampled, weights).flatten(2)


def locations(shapes: Sequence[tuple[int, int]], reference_points: Tensor, offsets: Tensor) -> Tensor:
    """Return where each point reads, (x, y) in [0, 1]. ``offsets`` count pixels of a level from a point, or halves of a
    box, which the points share."""
    centers = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[3] == 2:
        pixels = offsets.new_tensor([(w, h) for h, w in shapes])
        return centers + offsets / pixels[:, None]
    return centers + offsets / offsets.shape[4] * reference_points[:, :, None, :, None, 2:] * 0.5
