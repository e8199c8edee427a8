"""Computes a few rows of the affinity map at a time.

The logits s give T = tanh(s/2), and then M V = ½ (Σ V + T V) and (1 − M) V = ½ (Σ V − T V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._row_chunks import row_chunks


def affinity_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mean: bool) -> tuple[Tensor, Tensor]:
    """``q``, ``k`` [B, N, K], ``v`` [B, N, D] → two [B, N, D]."""

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.tanh(torch.bmm(q, k.transpose(1, 2)) * (scale / 2)), v)

    half = 0.5 / max(v.shape[1], 1) if mean else 0.5
    # Both terms are halved in the wide dtype, and only their sum is rounded: twice the result may not fit float16.
    wide = torch.promote_types(v.dtype, torch.float32)
    total = v.sum(dim=1, keepdim=True, dtype=wide) * half
    product = torch.cat([*row_chunks(compute, (q,), (k, v))], dim=1).to(wide) * half
    return (total + product).to(v.dtype), (total - product).to(v.dtype)
