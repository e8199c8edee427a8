"""Runs a linear layer on a weight that oneDNN packed before.

These private ops are what AOTInductor, ``torch.compile(dynamic=True)`` and, for bfloat16, every frozen graph runs. A
frozen graph of float32 with fixed sizes has MKL's packed form (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def is_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """Make a function [rows, K] → [rows, N] of ``weight`` [N, K], packed for that many rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
