"""Computes a few rows of the affinity map at a time: a pair of one class costs softplus(−s), any other softplus(s)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._row_chunks import row_chunks


def affinity_loss(q: Tensor, k: Tensor, labels: Tensor, scale: float, ignore_index: int) -> Tensor:
    """``q``, ``k`` [B, N, K], ``labels`` [B, N] → scalar."""
    wide = torch.promote_types(q.dtype, torch.float32)
    valid = labels != ignore_index

    def compute(q: Tensor, rows: Tensor, k: Tensor, labels: Tensor) -> Tensor:
        logits = torch.bmm(q, k.transpose(1, 2)).to(wide) * scale
        signed = torch.where(rows[:, :, None] == labels[:, None, :], -logits, logits)
        pairs = (rows != ignore_index)[:, :, None] & (labels != ignore_index)[:, None, :]
        return torch.nn.functional.softplus(signed).where(pairs, 0).sum()

    pairs = valid.sum(dim=1, dtype=wide).square().sum()
    return sum(row_chunks(compute, (q, labels), (k, labels))) / pairs.clamp(min=1)
