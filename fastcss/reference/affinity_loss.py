"""Takes the binary cross-entropy of the affinity map [B, N, N] with the pairs of one class, without ignored pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def affinity_loss(q: Tensor, k: Tensor, labels: Tensor, scale: float, ignore_index: int) -> Tensor:
    """``q``, ``k`` [B, N, K], ``labels`` [B, N] → scalar, the mean over all pairs that are left; 0 without any."""
    logits = q @ k.transpose(1, 2) * scale  # [B, N, N]
    same = (labels[:, :, None] == labels[:, None, :]).to(logits.dtype)
    valid = labels != ignore_index
    pairs = valid[:, :, None] & valid[:, None, :]
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, same, reduction="none")
    return losses.where(pairs, 0).sum(dtype=torch.promote_types(q.dtype, torch.float32)) / pairs.sum().clamp(min=1)
