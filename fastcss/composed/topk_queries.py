"""Finds the best class of some tokens at a time, so that the logits of all tokens and classes never exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# So many elements of the logits exist at a time.
ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


def topk_queries(features: Tensor, prototypes: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``features`` [B, N, D], ``prototypes`` [C, D] → queries [B, k, D], index [B, k], score [B, k]."""
    size = max(1, ELEMENTS.get(features.device.type, 1 << 24) // max(1, len(features) * len(prototypes)))
    score = torch.cat([F.linear(part, prototypes, bias).amax(dim=2) for part in features.split(size, dim=1)], dim=1)
    score, index = score.sort(dim=1, descending=True, stable=True)  # torch.topk leaves the order of ties open
    return features.take_along_dim(index[:, :k, None], dim=1), index[:, :k], score[:, :k]
