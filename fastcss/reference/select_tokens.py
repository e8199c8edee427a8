"""Loops over images and classes, and selects tokens as the equations do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._cosine import unit


def select_tokens(
    tokens: Tensor, classes: Tensor, threshold: float, length: int, best_only: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens`` [B, N, D], ``classes`` [B, C, D] → selected [B, C, length], counts [B, C], presence [B, C]."""
    cosine = unit(tokens) @ unit(classes).mT  # (3): [B, N, C]
    best = cosine.detach().masked_fill(cosine.isnan(), float("-inf")).argmax(dim=2)
    selected, counts, presence = [], [], []
    for b in range(len(tokens)):
        for c in range(classes.shape[1]):
            kept = (best[b] == c) & (cosine[b, :, c] >= threshold)  # (4)
            flat = tokens[b, kept].flatten()[:length]
            selected.append(F.pad(flat, (0, length - len(flat))))
            counts.append(kept.sum())
            averaged = kept if best_only else cosine[b, :, c] >= threshold
            presence.append(cosine[b, averaged, c].sum() / averaged.sum().clamp(min=1))  # (A.2)
    shape = classes.shape[:2]
    if not counts:
        return tokens.new_zeros(*shape, length), torch.zeros(shape).long(), tokens.new_zeros(shape)
    return tuple(torch.stack(parts).unflatten(0, shape) for parts in (selected, counts, presence))
