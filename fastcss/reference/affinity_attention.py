"""Computes intra = M V and inter = (1 − M) V with the affinity map M = sigmoid(scale · Q Kᵀ) [B, N, N]."""

from __future__ import annotations

import torch
from torch import Tensor


def affinity_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mean: bool) -> tuple[Tensor, Tensor]:
    """``q``, ``k`` [B, N, K], ``v`` [B, N, D] → two [B, N, D]."""
    affinity = torch.sigmoid(q @ k.transpose(1, 2) * scale)  # [B, N, N]
    intra, inter = affinity @ v, (1 - affinity) @ v
    pixels = max(v.shape[1], 1)
    return (intra / pixels, inter / pixels) if mean else (intra, inter)
