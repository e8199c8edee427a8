"""Takes the mean of the pixels' features for each class, weighted by the coarse segmentation."""

from __future__ import annotations

from torch import Tensor


def class_centers(logits: Tensor, feats: Tensor, over_classes: bool) -> Tensor:
    """``logits`` [B, C, N], ``feats`` [B, N, D] → [B, C, D]."""
    if not over_classes:
        return logits.softmax(dim=2) @ feats
    weights = logits.softmax(dim=1)
    return weights @ feats / weights.sum(dim=2, keepdim=True)
