"""Needs one softmax over the pixels: dividing by the class mass is a softmax of the log-softmax over the classes."""

from __future__ import annotations

import torch
from torch import Tensor


def class_centers(logits: Tensor, feats: Tensor, over_classes: bool) -> Tensor:
    """``logits`` [B, C, N], ``feats`` [B, N, D] → [B, C, D]."""
    if over_classes:
        logits = logits.log_softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.bmm(logits.softmax(dim=2).to(feats.dtype), feats)
