"""Computes y_s = x_s Wᵀ + bias + scale_t (x_s A_tᵀ) B_tᵀ, one adapter after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed_lora import PackedLora


def multi_lora(x: Tensor, weight: Tensor, bias: Tensor | None, lora: PackedLora, index: Tensor | None) -> Tensor:
    """``x`` [M, K] through every adapter, or ``x`` [S, M, K] with slot s through adapter ``index[s]``; → [S, M, N]."""
    slots = range(lora.num_adapters) if index is None else index.tolist()
    outputs = []
    for s, t in enumerate(slots):
        x_s = x if x.dim() == 2 else x[s]
        y = torch.nn.functional.linear(x_s, weight, bias)
        if t >= 0:
            rows = slice(*(int(bound[t]) for bound in lora.spans))
            a, b = lora.a[rows].to(x.dtype), lora.b[rows].to(x.dtype)
            y = y + (x_s @ a.t()) @ b * lora.scales[t].to(x.dtype)
        outputs.append(y)
    if not outputs:
        return torch.nn.functional.linear(x, weight, bias)  # [0, M, N]
    return torch.stack(outputs)
