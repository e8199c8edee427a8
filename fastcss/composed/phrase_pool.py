"""Takes two products per class: the cosines with all images, and the weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import unit


def phrase_pool(cls: Tensor, phrases: Tensor) -> Tensor:
    """``cls`` [B, D], ``phrases`` [C, M, D] → [B, C, D]."""
    classes, count, _ = phrases.shape
    cosine = (unit(cls) @ unit(phrases).flatten(0, 1).mT).view(-1, classes, count)
    weights = cosine.softmax(dim=2, dtype=torch.promote_types(cls.dtype, torch.float32)).to(cls.dtype)
    return torch.bmm(weights.transpose(0, 1), phrases).transpose(0, 1)
