"""Compares the true class with the best of the others, pixel by pixel, by the sorted logits and the softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def top_margin(
    logits: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``logits`` [B, C, N], ``labels`` [B, N] → margin, rival, p_true, p_rival, curvature, all [B, N]."""
    order = logits.detach().sort(dim=1, descending=True, stable=True).indices
    true = order[:, 0] if labels is None else labels
    ignored = torch.zeros_like(true, dtype=torch.bool) if labels is None else true == ignore_index
    true = true.masked_fill(ignored, 0)
    rival = torch.where(order[:, 0] == true, order[:, 1], order[:, 0])  # (2)
    pair = torch.stack([true, rival], dim=1)
    z, p = logits.gather(1, pair), logits.softmax(dim=1).gather(1, pair)
    margin = z[:, 0] - z[:, 1]  # (3)
    curvature = (p[:, 0] + p[:, 1]) - (p[:, 0] - p[:, 1]).square()
    margin, p_true, p_rival, curvature = (x.masked_fill(ignored, 0) for x in (margin, p[:, 0], p[:, 1], curvature))
    return margin, rival.masked_fill(ignored, -1), p_true, p_rival, curvature
