"""Holds one layer with its adapters, as every provider of ``multi_lora`` is given it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Layer:
    """Holds a linear layer with T adapters of one rank, its input, and the gradient of its output."""

    x: Tensor  # [M, K] or [T, M, K]
    weight: Tensor  # [N, K]
    bias: Tensor  # [N]
    a: Tensor  # [T, r, K]
    b: Tensor  # [T, r, N], scaled already: no provider pays for a scale that a caller could fold in
    dy: Tensor  # [T, M, N]

    @classmethod
    def random(cls, shape: dict, dtype: torch.dtype, device: str) -> Layer:
        m, k, n, t, r = (shape[name] for name in ("M", "K", "N", "T", "r"))

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, device=device) * scale).to(dtype)

        x = normal(m, k) if shape["form"] == "shared" else normal(t, m, k)
        return cls(
            x, normal(n, k, scale=k**-0.5), normal(n), normal(t, r, k, scale=k**-0.5), normal(t, r, n), normal(t, m, n)
        )

    @property
    def shared(self) -> bool:
        return self.x.dim() == 2

    @property
    def tasks(self) -> int:
        return self.a.shape[0]
