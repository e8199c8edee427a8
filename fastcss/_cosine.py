"""Normalises rows to length one, for every cosine of the package."""

from __future__ import annotations

import torch
from torch import Tensor

#: A shorter row counts as this long, so that a row of zeros has cosine 0 with everything.
SMALLEST = 1e-12


def unit(rows: Tensor) -> Tensor:
    """Return ``rows / max(‖rows‖, 1e-12)`` along the last dimension, with the length in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide)
    return (rows / length.clamp_min(SMALLEST)).to(rows.dtype)
