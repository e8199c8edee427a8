"""Runs one base GEMM, one shrink GEMM and one batched expand that starts from the base: T·M·N is written once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed_lora import PackedLora


def multi_lora(x: Tensor, weight: Tensor, bias: Tensor | None, lora: PackedLora, index: Tensor | None) -> Tensor:
    """``x`` [M, K] through every adapter, or ``x`` [S, M, K] with slot s through adapter ``index[s]``; → [S, M, N]."""
    base = torch.nn.functional.linear(x, weight, bias)  # [(S,) M, N]
    if lora.max_rank == 0:
        return base.expand(lora.num_adapters, *base.shape).clone() if base.dim() == 2 else base
    scales = lora.scales.to(x.dtype)
    if index is None:
        a, b = lora.padded()  # [T, R, K], [T, R, N]
    else:
        # A wrong index takes zeros, as -1 does, with a scale that makes its rows NaN: only the caller can refuse the
        # index without a stall.
        known = (index >= 0) & (index < lora.num_adapters)
        wrong, index = ~known & (index != -1), torch.where(known, index, -1)
        a, b = lora.padded(index)  # [S, R, ·]
        scales = torch.where(wrong, torch.nan, scales[index])
    a, b = a.to(x.dtype), b.to(x.dtype)
    if x.dim() == 2:
        hidden = (x @ a.flatten(0, 1).t()).unflatten(1, a.shape[:2]).transpose(0, 1)  # [S, M, R]
        base = base.expand(a.shape[0], *base.shape)
    else:
        hidden = torch.bmm(x, a.transpose(1, 2))
    return torch.baddbmm(base, hidden * scales[:, None, None], b)
