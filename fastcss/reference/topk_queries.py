"""Computes the logits of all tokens, takes each token's largest, and keeps the k best tokens."""

from __future__ import annotations

from torch import Tensor


def topk_queries(features: Tensor, prototypes: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``features`` [B, N, D], ``prototypes`` [C, D] → queries [B, k, D], index [B, k], score [B, k]."""
    logits = features @ prototypes.mT
    logits = logits if bias is None else logits + bias
    score, index = logits.amax(dim=2).sort(dim=1, descending=True, stable=True)
    return features.take_along_dim(index[:, :k, None], dim=1), index[:, :k], score[:, :k]
