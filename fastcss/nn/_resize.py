"""Resizes bilinearly, with a gradient that can be relied on."""

from __future__ import annotations

import torch
from torch import Tensor


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Compute ``F.interpolate(x, size, mode="bilinear", align_corners=False)`` as two products, in float32 at least.

    ``x`` [B, C, h, w] keeps its dtype. The gradient is deterministic on GPUs, and right under Inductor, which on CPU
    compiles that of ``F.interpolate`` into a cross-entropy to 0 if a batch norm is in the graph (torch 2.13).
    """
    if x.shape[2:] == size:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, columns = (_shares(small, large, wide) for small, large in zip(x.shape[2:], size, strict=True))
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ (wide @ columns.mT)).to(x.dtype)


def _shares(small: int, large: int, like: Tensor) -> Tensor:
    """Return [large, small], the share of each of the small positions in each of the large ones."""
    to, at = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (large, small))
    source = ((to + 0.5) * (small / large) - 0.5).clamp(0, small - 1)
    return (1 - (source[:, None] - at).abs()).clamp(min=0)
