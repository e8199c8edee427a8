"""Uses intra Cᵀ = M (F Cᵀ) where that is cheaper: values are then C wide, not D, and intra and inter never exist."""

from __future__ import annotations

import torch
from torch import Tensor

from .affinity_attention import affinity_attention


def class_affinity(
    q: Tensor, k: Tensor, feats: Tensor, centers: Tensor, scale: float, mean: bool
) -> tuple[Tensor, Tensor]:
    """``q``, ``k`` [B, N, K], ``feats`` [B, N, D], ``centers`` [B, C, D] → two [B, N, D]."""
    if centers_first(feats, centers):
        logits = affinity_attention(q, k, torch.bmm(feats, centers.transpose(1, 2)), scale, mean)
    else:
        logits = (torch.bmm(x, centers.transpose(1, 2)) for x in affinity_attention(q, k, feats, scale, mean))
    intra, inter = (torch.bmm(x.softmax(dim=2), centers) for x in logits)
    return intra, inter


def centers_first(feats: Tensor, centers: Tensor) -> bool:
    """Tell which order is cheaper: M (F Cᵀ) takes N²C + NCD products, (M F) Cᵀ for intra and inter N²D + 2NCD."""
    (_, pixels, width), classes = feats.shape, centers.shape[1]
    return classes * (pixels - width) <= pixels * width
