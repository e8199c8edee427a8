"""Writes the N × N map of each window, or of the whole map, with its bias, as transformers' SAM between its linear
layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """``q``, ``k``, ``v`` [B, H, W, heads, D], tables [2 Sh − 1, D], [2 Sw − 1, D], pads [B, heads, D] →
    [B, H, W, heads · D]. ``window`` 0 means the whole map."""
    height, width = q.shape[1:3]
    size = (window, window) if window else (max(1, height), max(1, width))
    q = partition(q, torch.zeros_like(pad_key), size)  # [B, rows, columns, heads, Sh, Sw, D]
    k, v = partition(k, pad_key, size).flatten(4, 5), partition(v, pad_value, size).flatten(4, 5)
    bias_h = torch.einsum("...hwd,hkd->...hwk", q, at_each_distance(rel_h, size[0]))
    bias_w = torch.einsum("...hwd,wkd->...hwk", q, at_each_distance(rel_w, size[1]))
    bias = bias_h[..., :, None] + bias_w[..., None, :]  # [B, rows, columns, heads, Sh, Sw, Sh, Sw]
    scores = q.flatten(4, 5) @ k.transpose(-2, -1) * scale + bias.flatten(6).flatten(4, 5)
    out = (scores.softmax(dim=-1) @ v).unflatten(4, size)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width]


def partition(x: Tensor, pad: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut ``x`` [B, H, W, heads, D], filled up with ``pad`` [B, heads, D] → [B, rows, columns, heads, Sh, Sw, D]."""
    height, width = x.shape[1:3]
    below, right = -height % size[0], -width % size[1]
    inside = F.pad(x.new_ones(height, width), (0, right, 0, below))[..., None, None].bool()
    x = torch.where(inside, F.pad(x, (0, 0, 0, 0, 0, right, 0, below)), pad[:, None, None])
    return x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0])).permute(0, 1, 3, 5, 2, 4, 6)


def at_each_distance(table: Tensor, size: int) -> Tensor:
    """Pick the rows of ``table`` [2 size − 1, D] for (query, key): [size, size, D]."""
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]
