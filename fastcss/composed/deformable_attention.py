"""Adds up the levels one after the other, so that the sampled values of all levels never exist together.

It works in float32 at least. grid_sample would round locations to an image's 16 bits, and on a CPU it reads from wrong
places, even outside the image, if 16 bits cannot count the image's strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """``value`` [B, S, heads, D], ``offsets`` [B, Q, heads, levels, points, 2] → [B, Q, heads · D]."""
    batch, _, heads, width = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    weights = logits.flatten(3).softmax(dim=3, dtype=dtype).view(logits.shape)
    reference_points = reference_points.to(dtype)
    total = value.new_zeros(batch * heads, width, offsets.shape[1], dtype=dtype)
    for level, part in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        height, columns = shapes[level]
        centers, step = reference_points[:, :, None, level, None, :2], offsets[:, :, :, level].to(dtype)
        if reference_points.shape[3] == 2:
            at = centers + torch.stack([step[..., 0] / columns, step[..., 1] / height], dim=-1)
        else:
            at = centers + step * (reference_points[:, :, None, level, None, 2:] * (0.5 / offsets.shape[4]))
        grid = (2 * at - 1).transpose(1, 2).flatten(0, 1)  # [B · heads, Q, points, 2]
        image = part.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, width, height, columns)
        sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B · heads, Q, points]
        total = total + torch.einsum("bdqp,bqp->bdq", sampled, share)
    return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
