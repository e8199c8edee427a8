"""Makes the scores of a few queries at a time. The bias of a query is Sh + Sw numbers, which are all kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ._row_chunks import row_chunks


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
    zeros = pad_key.new_zeros(()).expand(pad_key.shape)
    fill = (zeros, pad_key, pad_value) if window else (None, None, None)
    parts = [_windows(x, pad, size) for x, pad in zip((q, k, v), fill, strict=True)]
    windows = parts[0].shape[:4]  # B, rows, columns, heads
    q, k, v = (part.flatten(0, 3) for part in parts)  # [B · rows · columns · heads, Sh, Sw, D]
    bias_h = torch.einsum("bhwd,hkd->bhwk", q, _at_each_distance(rel_h, size[0]))
    bias_w = torch.einsum("bhwd,wkd->bhwk", q, _at_each_distance(rel_w, size[1]))

    def attend(q: Tensor, bias_h: Tensor, bias_w: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(2)  # [windows, queries of a chunk, Sh · Sw]
        return ((q @ k.transpose(1, 2)) * scale + bias).softmax(dim=2) @ v

    rows, whole = (x.flatten(1, 2) for x in (q, bias_h, bias_w)), (k.flatten(1, 2), v.flatten(1, 2))
    out = torch.cat([*row_chunks(attend, tuple(rows), whole)], dim=1).unflatten(1, size).unflatten(0, windows)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width]


def _windows(x: Tensor, pad: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Cut the map, filled up with ``pad``, into windows: [B, H, W, heads, D] → [B, rows, columns, heads, Sh, Sw, D]."""
    height, width = x.shape[1:3]
    if pad is not None:
        below, right = -height % size[0], -width % size[1]
        x = torch.cat([x, pad[:, None, None].expand(-1, height, right, -1, -1)], dim=2)
        x = torch.cat([x, pad[:, None, None].expand(-1, below, width + right, -1, -1)], dim=1)
    return x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0])).permute(0, 1, 3, 5, 2, 4, 6)


def _at_each_distance(table: Tensor, size: int) -> Tensor:
    """Pick the rows of ``table`` [2 size − 1, D] for (query, key): [size, size, D]."""
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]
