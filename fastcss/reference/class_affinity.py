"""Lets pixels attend to class centres through their affinity with all other pixels: equations 3.2 to 3.7 one by one."""

from __future__ import annotations

from torch import Tensor

from .affinity_attention import affinity_attention


def class_affinity(
    q: Tensor, k: Tensor, feats: Tensor, centers: Tensor, scale: float, mean: bool
) -> tuple[Tensor, Tensor]:
    """``q``, ``k`` [B, N, K], ``feats`` [B, N, D], ``centers`` [B, C, D] → two [B, N, D]."""
    intra, inter = affinity_attention(q, k, feats, scale, mean)
    return tuple((x @ centers.transpose(1, 2)).softmax(dim=2) @ centers for x in (intra, inter))
