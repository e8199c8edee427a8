"""Pads, rolls, partitions, attends, merges, rolls back and crops, as transformers' Swin between its linear layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    window: int,
    shift: int,
    scale: float,
) -> Tensor:
    """``q``, ``k``, ``v`` [B, H, W, heads, D], ``bias`` [heads, w², w²], pads [B, heads, D] → [B, H, W, heads · D]."""
    height, width = q.shape[1:3]
    q = partition(q, torch.zeros_like(pad_key), window, shift)  # [B, rows, columns, heads, window², D]
    k, v = partition(k, pad_key, window, shift), partition(v, pad_value, window, shift)
    scores = q @ k.transpose(-2, -1) * scale + bias
    if shift:
        scores = scores + shift_mask(*q.shape[1:3], window, shift, q)[:, :, None]
    out = scores.softmax(dim=-1) @ v
    out = out.transpose(3, 4).flatten(4).unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.roll((shift, shift), dims=(1, 2))[:, :height, :width]


def partition(x: Tensor, pad: Tensor, window: int, shift: int) -> Tensor:
    """Cut ``x`` [B, H, W, heads, D], filled up with ``pad`` [B, heads, D] → [B, rows, columns, heads, window², D]."""
    height, width = x.shape[1:3]
    below, right = -height % window, -width % window
    inside = F.pad(x.new_ones(height, width), (0, right, 0, below))[..., None, None].bool()
    x = torch.where(inside, F.pad(x, (0, 0, 0, 0, 0, right, 0, below)), pad[:, None, None])
    x = x.roll((-shift, -shift), dims=(1, 2)).unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).transpose(3, 4)


def shift_mask(rows: int, columns: int, window: int, shift: int, like: Tensor) -> Tensor:
    """Return -100 between tokens of a window that were no neighbours before the roll: [rows, columns, w², w²]."""

    def regions(windows: int) -> Tensor:
        at = torch.arange(windows * window, device=like.device)
        return (at >= (windows - 1) * window).long() + (at >= windows * window - shift).long()

    region = 3 * regions(rows)[:, None] + regions(columns)
    region = region.unflatten(1, (columns, window)).unflatten(0, (rows, window)).transpose(1, 2).flatten(2)
    return (region[..., None] != region[..., None, :]).to(like.dtype) * -100
