"""Adds up the phrases of each class, weighted by how close they are to the image."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import unit


def phrase_pool(cls: Tensor, phrases: Tensor) -> Tensor:
    """``cls`` [B, D], ``phrases`` [C, M, D] → [B, C, D]."""
    cosine = torch.einsum("bd,cmd->bcm", unit(cls), unit(phrases))
    return torch.einsum("bcm,cmd->bcd", cosine.softmax(dim=2), phrases)  # (1), (2)
