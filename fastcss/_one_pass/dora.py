"""Computes by what DoRA scales the outputs of an adapted layer: its magnitude over the norm of W + s B A.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), section 4.3: the norm is a constant in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .read_adapters import LoraWeights, is_conv1d


def scales_outputs(adapters: Sequence[LoraWeights | None]) -> bool:
    """Tell whether one of ``adapters`` is DoRA."""
    return any(w is not None and w.magnitude is not None for w in adapters)


def output_scales(adapters: Sequence[LoraWeights | None], base: nn.Module, like: Tensor) -> Tensor | None:
    """Return by what each adapter scales its outputs before the bias, [T + 1, N], or None if none of them does.

    The rows of adapters that do not, and the last one, which index -1 finds, are ones.
    """
    if not scales_outputs(adapters):
        return None
    one = like.new_ones(1)
    scales = [one if w is None or w.magnitude is None else _scale(w, base, like.dtype) for w in adapters]
    width = max(len(scale) for scale in scales)
    return torch.stack([*(scale.expand(width) for scale in scales), one.expand(width)])


def _scale(weights: LoraWeights, base: nn.Module, dtype: torch.dtype) -> Tensor:
    # Autocast would take the product of B and A in fewer bits, and the scales are kept for calls without it.
    with torch.no_grad(), torch.autocast(weights.a.device.type, enabled=False):
        w, a, b = (tensor.to(dtype) for tensor in (base.weight, weights.a, weights.b))
        if isinstance(base, nn.Embedding) or is_conv1d(base):
            w = w.t()
        # PEFT takes these shapes for grouped convolutions too, where they give another matrix than B · A.
        delta = (b.reshape(-1, a.shape[0]) @ a.flatten(1)).view(w.shape)
        norms = torch.linalg.vector_norm(torch.add(w, delta, alpha=weights.scale).flatten(1), dim=1)
    return weights.magnitude.to(dtype).flatten() / norms
