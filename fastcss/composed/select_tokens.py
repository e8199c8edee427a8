"""Needs no loop and no host sync: a running count gives each token its place among those of its class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._cosine import unit


def select_tokens(
    tokens: Tensor, classes: Tensor, threshold: float, length: int, best_only: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens`` [B, N, D], ``classes`` [B, C, D] → selected [B, C, length], counts [B, C], presence [B, C]."""
    (batch, count, width), class_count = tokens.shape, classes.shape[1]
    places = -(-length // width)  # so many tokens fit, the last one perhaps in part
    wide = torch.promote_types(tokens.dtype, torch.float32)
    cosine = torch.bmm(unit(tokens), unit(classes).mT)
    best = cosine.detach().nan_to_num(nan=float("-inf")).argmax(dim=2, keepdim=True)
    above = cosine >= threshold  # [B, N, C]; NaN is not
    survives = above.gather(2, best)[..., 0]  # [B, N]
    chosen = (best == torch.arange(class_count, device=best.device)) & survives[..., None]  # [B, N, C]
    place = chosen.cumsum(dim=1).gather(2, best)[..., 0] - 1
    counts = chosen.sum(dim=1)
    averaged = chosen if best_only else above
    total = torch.where(averaged, cosine, 0).sum(dim=1, dtype=wide)
    presence = (total / averaged.sum(dim=1).clamp(min=1)).to(tokens.dtype)
    # Each token gets a slot in [C · places]; tokens that do not fit share one slot past the end.
    spare = class_count * places
    slot = torch.where(survives & (place < places), best[..., 0] * places + place, spare)
    source = tokens.new_full((batch, spare + 1), count, dtype=torch.int64)
    source = source.scatter(1, slot, torch.arange(count, device=tokens.device).expand(batch, -1))
    padded = F.pad(tokens, (0, 0, 0, 1))  # token N: zeros
    selected = padded.take_along_dim(source[:, :-1, None], dim=1).view(batch, class_count, places * width)
    return selected[..., :length], counts, presence
